"""The exercises of chapter 06 refuse the mistakes that people make with rotary positions."""

from exercise_harness import exercise_tests

TURN = """
def turn(x_TD, pos_T, theta):
    import torch
    D = x_TD.shape[1]
    omega_K = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
    angle_TK = {angle}
    a_TK, b_TK = {pair}
    cos, sin = angle_TK.cos(), angle_TK.sin()
    return {out}
"""
RIGHT = {
    "angle": "pos_T[:, None].double() * omega_K.double()",
    "pair": "x_TD.double().chunk(2, dim=1)",
    "out": "torch.cat([a_TK * cos - b_TK * sin, a_TK * sin + b_TK * cos], dim=1).to(x_TD.dtype)",
}

STEP = """
def decode_step(q_D, k_D, v_D, k_SD, v_SD, turn):
    import math
    import torch
    S = len(k_SD)
    new_1D = {key}
    k_SD = torch.cat([{cached}, new_1D])
    v_SD = torch.cat([v_SD, {value}])
    query_D = {query}
    weights_S = ({score}).softmax(dim=0)
    return weights_S @ v_SD, k_SD, v_SD
"""
RIGHT_STEP = {
    "key": "turn(k_D[None], torch.tensor([S]))",
    "cached": "k_SD",
    "value": "v_D[None]",
    "query": "turn(q_D[None], torch.tensor([S]))[0]",
    "score": "k_SD @ query_D / math.sqrt(len(q_D))",
}


def turn(**changes: str) -> str:
    return TURN.format(**RIGHT | changes)


def step(**changes: str) -> str:
    return STEP.format(**RIGHT_STEP | changes)


WRONG = {
    "frequencies": [
        (
            "exponent -i over R",
            """
            def frequencies(rotary_dim, theta):
                import torch
                return theta ** (-torch.arange(rotary_dim // 2) / rotary_dim)
            """,
            r"exponent -2i/R; you have -i/R",
        ),
        (
            "rounded to bfloat16",
            """
            def frequencies(rotary_dim, theta):
                import torch
                return (theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)).bfloat16()
            """,
            r"bfloat16; angles need float32",
        ),
        (
            "periods",
            """
            def frequencies(rotary_dim, theta):
                import torch
                return theta ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
            """,
            r"exponent is negative",
        ),
        (
            "one for each number",
            """
            def frequencies(rotary_dim, theta):
                import torch
                return theta ** (-torch.arange(rotary_dim) / rotary_dim)
            """,
            r"expected 4: one for each pair",
        ),
        (
            "linspace to one over theta",
            """
            def frequencies(rotary_dim, theta):
                import torch
                return theta ** -torch.linspace(0, 1, rotary_dim // 2)
            """,
            r"exactly 1/theta",
        ),
        (
            "times two pi",
            """
            def frequencies(rotary_dim, theta):
                import math
                import torch
                return 2 * math.pi * theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
            """,
            r"in radians",
        ),
        (
            "slowest first",
            """
            def frequencies(rotary_dim, theta):
                import torch
                return (theta ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)).flip(0)
            """,
            r"wrong order",
        ),
        (
            "fixed theta",
            """
            def frequencies(rotary_dim, theta):
                import torch
                return 10000.0 ** (-torch.arange(0, rotary_dim, 2) / rotary_dim)
            """,
            r"take theta from the argument",
        ),
    ],
    "turn": [
        ("degrees", turn(angle="torch.deg2rad(pos_T[:, None].double() * omega_K.double())"), r"radians already"),
        (
            "sine with the wrong sign",
            turn(out="torch.cat([a_TK * cos + b_TK * sin, b_TK * cos - a_TK * sin], dim=1).to(x_TD.dtype)"),
            r"sine has the wrong sign",
        ),
        (
            "no minus at all",
            turn(out="torch.cat([a_TK * cos + b_TK * sin, a_TK * sin + b_TK * cos], dim=1).to(x_TD.dtype)"),
            r"only a cos - b sin has the minus",
        ),
        (
            "interleaved",
            turn(
                pair="x_TD.double()[:, 0::2], x_TD.double()[:, 1::2]",
                out="torch.stack([a_TK * cos - b_TK * sin, a_TK * sin + b_TK * cos], dim=2).flatten(1).to(x_TD.dtype)",
            ),
            r"interleaved layout",
        ),
        (
            "interleaved in, half-split out",
            turn(pair="x_TD.double()[:, 0::2], x_TD.double()[:, 1::2]"),
            r"the row at position 0",
        ),
        (
            "angles of the neighbour",
            """
            def turn(x_TD, pos_T, theta):
                import torch
                D = x_TD.shape[1]
                omega_K = 1.0 / theta ** (torch.arange(0, D, 2, dtype=torch.float32) / D)
                angle_TD = (pos_T[:, None] * omega_K).double().repeat_interleave(2, dim=1)
                a_TK, b_TK = x_TD.chunk(2, dim=1)
                return x_TD * angle_TD.cos() + torch.cat([-b_TK, a_TK], dim=1) * angle_TD.sin()
            """,
            r"repeat_interleave gives each its neighbour",
        ),
        (
            "row numbers for positions",
            turn(angle="torch.arange(len(x_TD))[:, None].double() * omega_K.double()"),
            r"as pos_T says",
        ),
        (
            "angles in the dtype of x",
            turn(
                angle="pos_T[:, None].to(x_TD.dtype) * omega_K.to(x_TD.dtype)",
                pair="x_TD.chunk(2, dim=1)",
            ),
            r"make the angles in float32",
        ),
        (
            "forgets the dtype",
            turn(out="torch.cat([a_TK * cos - b_TK * sin, a_TK * sin + b_TK * cos], dim=1).float()"),
            r"keep the dtype of x",
        ),
        (
            "fixed theta",
            turn(angle="pos_T[:, None].double() * (1e4 ** (-torch.arange(0, D, 2, dtype=torch.float32) / D)).double()"),
            r"theta = 500",
        ),
        (
            "cos and sin from different pairs",
            turn(out="torch.cat([a_TK * cos - b_TK * sin, a_TK * sin.flip(1) + b_TK * cos], dim=1).to(x_TD.dtype)"),
            r"a turn changes no length",
        ),
    ],
    "to_interleaved": [
        (
            "the way back",
            """
            def to_interleaved(weight, n_head):
                return weight.view(n_head, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            """,
            r"the way back",
        ),
        (
            "over all heads",
            """
            def to_interleaved(weight, n_head):
                return weight.view(2, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape)
            """,
            r"heads were mixed",
        ),
        (
            "the columns",
            """
            def to_interleaved(weight, n_head):
                return weight.view(len(weight), 2, -1).transpose(1, 2).reshape(weight.shape)
            """,
            r"only their order",
        ),
        (
            "nothing",
            """
            def to_interleaved(weight, n_head):
                return weight
            """,
            r"nothing was reordered",
        ),
        (
            "halves swapped",
            """
            def to_interleaved(weight, n_head):
                heads = weight.view(n_head, 2, -1, weight.shape[1]).flip(1)
                return heads.transpose(1, 2).reshape(weight.shape)
            """,
            r"weight\[0, 0\]",
        ),
    ],
    "decode_step": [
        ("restarts at 0", step(key="turn(k_D[None], torch.tensor([0]))"), r"turned to position 0"),
        ("stores the key unturned", step(key="k_D[None]"), r"turned to position 0, or not at all"),
        ("one too far", step(key="turn(k_D[None], torch.tensor([S + 1]))"), r"not to position 6"),
        ("query at 0", step(query="q_D"), r"query was turned to 0"),
        ("query one too early", step(query="turn(q_D[None], torch.tensor([S - 1]))[0]"), r"query was turned to 5"),
        ("turns the cache again", step(cached="turn(k_SD, torch.arange(S))"), r"cached keys have changed"),
        ("turns the value", step(value="turn(v_D[None], torch.tensor([S]))"), r"values have changed"),
        ("no root", step(score="k_SD @ query_D"), r"not divided by"),
        (
            "does not see itself",
            """
            def decode_step(q_D, k_D, v_D, k_SD, v_SD, turn):
                import math
                import torch
                place = torch.tensor([len(k_SD)])
                weights = (k_SD @ turn(q_D[None], place)[0] / math.sqrt(len(q_D))).softmax(dim=0)
                return weights @ v_SD, torch.cat([k_SD, turn(k_D[None], place)]), torch.cat([v_SD, v_D[None]])
            """,
            r"does not see its own",
        ),
        ("a position that is no tensor of rows", step(key="turn(k_D, torch.tensor([S]))[None]"), r"turn wants rows"),
        (
            "only the output",
            """
            def decode_step(q_D, k_D, v_D, k_SD, v_SD, turn):
                return v_D
            """,
            r"return three things",
        ),
    ],
    "ntk_theta": [
        (
            "times the factor",
            """
            def ntk_theta(theta, rotary_dim, factor):
                return theta * factor
            """,
            r"slows the slowest pair by too little",
        ),
        (
            "exponent upside down",
            """
            def ntk_theta(theta, rotary_dim, factor):
                return theta * factor ** ((rotary_dim - 2) / rotary_dim)
            """,
            r"upside down",
        ),
        (
            "brackets around both",
            """
            def ntk_theta(theta, rotary_dim, factor):
                return theta ** (rotary_dim / (rotary_dim - 2)) * factor
            """,
            r"belongs to the factor",
        ),
        (
            "pairs for numbers",
            """
            def ntk_theta(theta, rotary_dim, factor):
                return theta * factor ** (rotary_dim / 2 / (rotary_dim / 2 - 2))
            """,
            r"not the number of pairs",
        ),
        (
            "faster instead of slower",
            """
            def ntk_theta(theta, rotary_dim, factor):
                return theta / factor ** (rotary_dim / (rotary_dim - 2))
            """,
            r"makes the pairs faster",
        ),
        (
            "head of 64 taken for granted",
            """
            def ntk_theta(theta, rotary_dim, factor):
                return theta * factor ** (64 / 62)
            """,
            r"slowest of 16 pairs",
        ),
    ],
}

TestExercises = exercise_tests("06", WRONG)
