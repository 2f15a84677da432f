"""Seeds of parallel samples."""

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample ``index`` of a request: ``seed`` itself for sample 0, then outputs of SplitMix64 from it.

    Increment and finaliser as in Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    if index == 0:
        return seed
    mixed = (seed + _GOLDEN * index) & _MASK
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & _MASK
    return mixed ^ mixed >> 31
