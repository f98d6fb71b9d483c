from tritoncaps.kernels._launch import UnsupportedShape
from tritoncaps.kernels.capsule_routing import capsule_routing_bwd, capsule_routing_fwd
from tritoncaps.kernels.squash import squash_bwd, squash_fwd
