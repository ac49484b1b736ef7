"""How many bytes a linear map's weight takes in each stored form, to the byte.

    16 bits          2 n
    8 bits           n + 4 out                                           codes, one scale for each output
    4 bits           ceil(n / 2) + 4 ceil(n / 64) + 64                   codes, scales, the 16 levels
    4 bits, nested   ceil(n / 2) + m + 4 ceil(m / 256) + 64 + 1024 + 4   m = ceil(n / 64) scales in 8 bits, their own scales,
                                                                         both tables of levels, the offset

Dettmers et al. 2023, "QLoRA", https://arxiv.org/abs/2305.14314 (section 3, double quantisation).
"""

from __future__ import annotations

BLOCK, NESTED_BLOCK = 64, 256  # numbers that share a scale
LEVELS, NESTED_LEVELS = 4 * 16, 4 * 256  # bytes of the tables
FORMS = ("float32", "bfloat16", "float16", "int8", "nf4", "nf4 nested", "fp4", "fp4 nested")


def stored_bytes(form: str, out: int, inner: int) -> int:
    """Bytes of a weight `(out, inner)` in one of `FORMS`."""
    count = out * inner
    if form in ("float32", "bfloat16", "float16"):
        return count * (4 if form == "float32" else 2)
    if form == "int8":
        return count + 4 * out
    assert form in FORMS, form
    codes, scales = -(-count // 2), -(-count // BLOCK)
    if not form.endswith("nested"):
        return codes + 4 * scales + LEVELS
    return codes + scales + 4 * -(-scales // NESTED_BLOCK) + LEVELS + NESTED_LEVELS + 4
