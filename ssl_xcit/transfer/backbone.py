"""Give a backbone the layers that a task needs."""

from ssl_xcit.models.weights import load_strictly
from ssl_xcit.models.xcit import DropRate, NumClasses, XCiT


def with_layers(
    backbone: XCiT, *, pyramid: bool = False, num_classes: NumClasses = 0, drop_path: DropRate = 0.0
) -> XCiT:
    """A network with the weights of `backbone` and other layers around them.

    Args:
        backbone: stays as it is.
        pyramid: whether the network has the layers of `XCiT.pyramid`: the backbone's where it has
            them, else fresh ones.
        num_classes: size of the classifier: the backbone's where it has as many classes, else a
            fresh one (0: none).
        drop_path: rate of stochastic depth.

    Returns:
        A network on the CPU, in training mode, with the backbone's preprocessing.
    """
    architecture = {**backbone.architecture, "num_classes": num_classes, "pyramid": pyramid}
    network = XCiT(**architecture, drop_path=drop_path)
    same = {
        "head.": num_classes == backbone.architecture["num_classes"],
        "fpn": pyramid == ("pyramid" in backbone.architecture),
    }
    replaced = tuple(prefix for prefix, kept in same.items() if not kept)
    given, fresh = backbone.state_dict(), network.state_dict()
    state = {k: v for k, v in given.items() if not k.startswith(replaced)}
    state |= {k: v for k, v in fresh.items() if k.startswith(replaced)}
    load_strictly(network, state, "the backbone")
    network.preprocess = dict(backbone.preprocess)
    network.checkpoint_blocks = backbone.checkpoint_blocks
    return network
