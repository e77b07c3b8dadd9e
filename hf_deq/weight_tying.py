"""What tying weights over depth asks for: randomness that stays fixed while an equilibrium is solved."""

import torch


def draw_dropout_mask(like: torch.Tensor, probability: float, training: bool) -> torch.Tensor | None:
    """One dropout mask for a whole solve, shape of `like`, scaled to keep expectations; `None` when it does nothing.

    A mask drawn anew in every evaluation would move the fixed point while it is being solved
    (variational dropout over depth; Gal & Ghahramani 2016, Bai et al. 2019 appendix A).
    """
    if not training or probability == 0:
        return None
    keep = torch.empty_like(like, requires_grad=False).bernoulli_(1 - probability)
    return keep.div_(1 - probability)


def apply_mask(state: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """`state * mask`, or `state` where there is no mask."""
    return state if mask is None else state * mask
