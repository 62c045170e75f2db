"""A schedule: the factor of the learning rate at a step."""


def inverse_root(step: int, *, total_steps: int, warmup_steps: int, offset: int = 4) -> float:
    """Warm up, then decay with the inverse square root."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return (offset / (offset + step - warmup_steps)) ** 0.5
