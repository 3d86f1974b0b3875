"""What loses nothing: a check of an installation. Its bits are those of 8-bit RGB."""


def identity(video):
    return video, 8 * video[0].numel()


identity.num_frames = identity.size = None
