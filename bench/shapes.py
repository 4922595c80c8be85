"""Weight shapes (n, k) of real layers by name; several n: matrices that share their input."""

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "8b_gate_up": ((28672,), 4096),  # as one matrix
    "70b_gate_up": ((57344,), 8192),
    "70b_o": ((8192,), 8192),
    "8b_down": ((4096,), 14336),
    "8b_o": ((4096,), 4096),
    "8b_kv": ((1024,), 4096),
    "8b_qkv": ((4096, 1024, 1024), 4096),
    "8b_gate+up": ((14336, 14336), 4096),
    "1b_gate_up": ((16384,), 2048),
    "3b_gate_up": ((16384,), 3072),
    "70b_down": ((8192,), 28672),
    "qwen7b_gate_up": ((37888,), 3584),
    "qwen7b_down": ((3584,), 18944),
    "135m_gate_up": ((3072,), 576),
    "135m_down": ((576,), 1536),
}

# The shapes and grids with targets.
MAIN = ("8b_gate_up", "70b_gate_up", "70b_o", "8b_down", "8b_o")
BITS = {"4": "p2_n256", "3": "p2_n64", "2": "p4_n256", "1.5": "p4_n64", "1": "p4_n16"}
