"""The exercises of chapter 02: the solution passes, the stub fails, and usual mistakes are named."""

from exercise_harness import exercise_tests

WRONG = {
    "embed_by_product": [
        (
            "width guessed from the ids",
            """
def embed_by_product(idx_BT, table_VC):
    import torch.nn.functional as F
    return F.one_hot(idx_BT).float() @ table_VC
""",
            r"raised RuntimeError",
        ),
        (
            "one-hot left as whole numbers",
            """
def embed_by_product(idx_BT, table_VC):
    import torch.nn.functional as F
    return F.one_hot(idx_BT, table_VC.shape[0]) @ table_VC
""",
            r"raised RuntimeError",
        ),
        (
            "one-hot not multiplied",
            """
def embed_by_product(idx_BT, table_VC):
    import torch.nn.functional as F
    return F.one_hot(idx_BT, table_VC.shape[0]).float()
""",
            r"still one-hot rows",
        ),
        (
            "table detached from its gradient",
            """
def embed_by_product(idx_BT, table_VC):
    import torch.nn.functional as F
    return F.one_hot(idx_BT, table_VC.shape[0]).float() @ table_VC.detach()
""",
            r"no gradient reaches the table",
        ),
        (
            "batch flattened away",
            """
def embed_by_product(idx_BT, table_VC):
    import torch.nn.functional as F
    return F.one_hot(idx_BT.flatten(), table_VC.shape[0]).float() @ table_VC
""",
            r"shape \(8, 3\), expected \(2, 4, 3\)",
        ),
        (
            "id as the column of the table",
            """
def embed_by_product(idx_BT, table_VC):
    import torch.nn.functional as F
    return F.one_hot(idx_BT, table_VC.shape[0]).float() @ table_VC.flip(0)
""",
            r"x_BTC\[0, 0, 0\] is",
        ),
    ],
    "nearest": [
        (
            "dot product",
            """
def nearest(table_VC, token, k):
    import torch
    score_V = table_VC @ table_VC[token]
    score_V[token] = -torch.inf
    return score_V.topk(k).indices.tolist()
""",
            r"dot product",
        ),
        (
            "only the query divided by its length",
            """
def nearest(table_VC, token, k):
    import torch
    score_V = table_VC @ (table_VC[token] / table_VC[token].norm())
    score_V[token] = -torch.inf
    return score_V.topk(k).indices.tolist()
""",
            r"divide by both lengths",
        ),
        (
            "the token itself among them",
            """
def nearest(table_VC, token, k):
    import torch.nn.functional as F
    unit_VC = F.normalize(table_VC, dim=1)
    return (unit_VC @ unit_VC[token]).topk(k).indices.tolist()
""",
            r"token 0 is in its own list",
        ),
        (
            "distance",
            """
def nearest(table_VC, token, k):
    import torch
    distance_V = (table_VC - table_VC[token]).norm(dim=1)
    distance_V[token] = torch.inf
    return distance_V.topk(k, largest=False).indices.tolist()
""",
            r"order by distance",
        ),
        (
            "smallest cosines",
            """
def nearest(table_VC, token, k):
    import torch
    import torch.nn.functional as F
    cosine_V = F.cosine_similarity(table_VC, table_VC[token][None], dim=1)
    cosine_V[token] = torch.inf
    return cosine_V.topk(k, largest=False).indices.tolist()
""",
            r"least alike",
        ),
        (
            "a tensor of ids",
            """
def nearest(table_VC, token, k):
    import torch
    import torch.nn.functional as F
    cosine_V = F.cosine_similarity(table_VC, table_VC[token][None], dim=1)
    cosine_V[token] = -torch.inf
    return cosine_V.topk(k).indices
""",
            r"tolist",
        ),
        (
            "the least alike of them first",
            """
def nearest(table_VC, token, k):
    import torch
    import torch.nn.functional as F
    cosine_V = F.cosine_similarity(table_VC, table_VC[token][None], dim=1)
    cosine_V[token] = -torch.inf
    return sorted(cosine_V.topk(k).indices.tolist(), key=lambda i: cosine_V[i].item())
""",
            r"another order",
        ),
        (
            "token zero left out instead of the token",
            """
def nearest(table_VC, token, k):
    import torch
    import torch.nn.functional as F
    cosine_V = F.cosine_similarity(table_VC, table_VC[token][None], dim=1)
    cosine_V[0] = -torch.inf
    return cosine_V.topk(k).indices.tolist()
""",
            r"neighbours of token 7",
        ),
    ],
    "sinusoid_table": [
        (
            "sine in every column",
            """
def sinusoid_table(P, C):
    import torch
    omega = 10000.0 ** (-torch.arange(0, C, 2) / C)
    return torch.sin(torch.arange(P)[:, None] * omega.repeat_interleave(2))
""",
            r"every column is a sine",
        ),
        (
            "exponent off by a factor of two",
            """
def sinusoid_table(P, C):
    import torch
    angle = torch.arange(P)[:, None] * 10000.0 ** (-torch.arange(C // 2) / C)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
""",
            r"exponent is half",
        ),
        (
            "halves instead of interleaved",
            """
def sinusoid_table(P, C):
    import torch
    angle = torch.arange(P)[:, None] * 10000.0 ** (-torch.arange(0, C, 2) / C)
    return torch.cat([angle.sin(), angle.cos()], dim=1)
""",
            r"interleaves",
        ),
        (
            "positions from one",
            """
def sinusoid_table(P, C):
    import torch
    angle = torch.arange(1, P + 1)[:, None] * 10000.0 ** (-torch.arange(0, C, 2) / C)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
""",
            r"positions start at 1",
        ),
        (
            "sine and cosine swapped",
            """
def sinusoid_table(P, C):
    import torch
    angle = torch.arange(P)[:, None] * 10000.0 ** (-torch.arange(0, C, 2) / C)
    return torch.stack([angle.cos(), angle.sin()], dim=-1).flatten(1)
""",
            r"swapped",
        ),
        (
            "a frequency for each column",
            """
def sinusoid_table(P, C):
    import torch
    angle = torch.arange(P)[:, None] * 10000.0 ** (-torch.arange(C) / C)
    return torch.where(torch.arange(C) % 2 == 0, angle.sin(), angle.cos())
""",
            r"share one",
        ),
        (
            "multiplied by the power",
            """
def sinusoid_table(P, C):
    import torch
    angle = torch.arange(P, dtype=torch.float64)[:, None] * 10000.0 ** (torch.arange(0, C, 2, dtype=torch.float64) / C)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
""",
            r"divide the position",
        ),
        (
            "columns before positions",
            """
def sinusoid_table(P, C):
    import torch
    angle = torch.arange(P)[:, None] * 10000.0 ** (-torch.arange(0, C, 2) / C)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1).T
""",
            r"shape \(8, 6\), expected \(6, 8\)",
        ),
    ],
    "add_positions": [
        (
            "padding counted",
            """
def add_positions(x_BTC, table_PC, lengths_B):
    return x_BTC + table_PC[: x_BTC.shape[1]]
""",
            r"2 of padding, and they were counted",
        ),
        (
            "minus one looked up",
            """
def add_positions(x_BTC, table_PC, lengths_B):
    import torch
    T = x_BTC.shape[1]
    pos_BT = (torch.arange(T) - (T - lengths_B[:, None])).clamp(min=-1)
    return x_BTC + table_PC[pos_BT]
""",
            r"last row of the table",
        ),
        (
            "negative positions looked up",
            """
def add_positions(x_BTC, table_PC, lengths_B):
    import torch
    T = x_BTC.shape[1]
    return x_BTC + table_PC[torch.arange(T) - (T - lengths_B[:, None])]
""",
            r"counted from the end",
        ),
        (
            "padding on the right",
            """
def add_positions(x_BTC, table_PC, lengths_B):
    import torch
    T = x_BTC.shape[1]
    pos_BT = torch.arange(T).expand(len(lengths_B), T)
    return x_BTC + table_PC[torch.where(pos_BT < lengths_B[:, None], pos_BT, 0)]
""",
            r"as if the padding were on the right",
        ),
        (
            "positions from one",
            """
def add_positions(x_BTC, table_PC, lengths_B):
    import torch
    T = x_BTC.shape[1]
    return x_BTC + table_PC[(torch.arange(1, T + 1) - (T - lengths_B[:, None])).clamp(min=0)]
""",
            r"positions start at 0",
        ),
        (
            "not added but put in their place",
            """
def add_positions(x_BTC, table_PC, lengths_B):
    import torch
    T = x_BTC.shape[1]
    return table_PC[(torch.arange(T) - (T - lengths_B[:, None])).clamp(min=0)]
""",
            r"position vectors alone",
        ),
        (
            "nothing added",
            """
def add_positions(x_BTC, table_PC, lengths_B):
    return x_BTC
""",
            r"nothing was added",
        ),
    ],
}
TestExercises = exercise_tests("02", WRONG)
