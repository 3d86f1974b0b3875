import dataclasses

import pytest

from eval import protocols
from eval.protocols import PROTOCOLS


def test_the_named_protocols():
    assert set(PROTOCOLS) == {
        "larp_rfvd", "larp_gfvd10k", "larp_k600fp50k", "coordtok_rfvd10k_128f", "styleganv_fvd2048_16f",
        "styleganv_fvd2048_128f",
    }
    assert all(name == protocol.name for name, protocol in PROTOCOLS.items())
    assert all(protocols.NOT_OURS in anchor for protocol in PROTOCOLS.values() for anchor in protocol.anchors)


def test_bad_protocol():
    with pytest.raises(ValueError, match="divisor"):
        dataclasses.replace(PROTOCOLS["larp_rfvd"], divisor="n-1")
    with pytest.raises(ValueError, match="i3d_resize"):
        dataclasses.replace(PROTOCOLS["larp_rfvd"], i3d_resize="crop")
