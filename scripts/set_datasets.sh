#!/usr/bin/env bash
# Links data/ucf101 and data/k600 to the copies you have, and writes the lists data/metadata/*.csv of what is in them:
#   UCF_ROOT=/path/UCF-101 K600_ROOT=/path/k600 K600_ANNOTATIONS="train.csv val.csv" bash scripts/set_datasets.sh
# K600_ROOT holds train/ and val/ (files ID_ssssss_eeeeee.mp4); annotations have columns label, youtube_id, time_start,
# time_end, split, as Kinetics-600 ships them. Either data set alone is enough. Links made before are kept.
source "$(dirname "$0")/setup.sh"

link() {  # link NAME ROOT: data/NAME -> ROOT
    if [ -n "$2" ]; then
        [ -d "$2" ] || { echo "error: $2 is not a folder: give the path of $1's videos" >&2; exit 1; }
        [ ! -e "data/$1" ] || [ -L "data/$1" ] || { echo "error: data/$1 is there and not a link: move it away" >&2; exit 1; }
        ln -sfn "$(cd "$2" && pwd)" "data/$1"
    fi
    [ -e "data/$1" ]
}

found=
if link ucf101 "${UCF_ROOT:-}"; then
    python data/metadata.py ucf101
    found=1
fi
if link k600 "${K600_ROOT:-}"; then
    [ -n "${K600_ANNOTATIONS:-}" ] || { echo 'error: K600_ANNOTATIONS="train.csv val.csv" is needed for the lists of K600' >&2; exit 1; }
    # Several files, split at spaces.
    # shellcheck disable=SC2086
    python data/metadata.py k600 --annotations $K600_ANNOTATIONS
    found=1
fi
[ -n "$found" ] || {
    echo "error: no data set: set UCF_ROOT to UCF-101's folder of class folders, K600_ROOT to a folder with Kinetics-600's" \
        "train/ and val/, or both" >&2
    exit 1
}
