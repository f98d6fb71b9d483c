"""EM routing in the patches of a grid, each by `em_routing`."""

from tritoncaps._native.em_routing import em_routing_bwd, em_routing_fwd
from tritoncaps._torch_path.conv_em_routing import in_patches

conv_em_routing_fwd, conv_em_routing_bwd = in_patches(em_routing_fwd, em_routing_bwd)
