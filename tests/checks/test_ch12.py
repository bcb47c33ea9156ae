"""The exercises of chapter 12, fully sharded training, and the wrong answers that people give."""

from exercise_harness import exercise_tests


def bill(parameters: str = "stage >= 3", gradients: str = "stage >= 2", optimizer: str = "stage >= 1") -> str:
    """An answer that shares out each part if its condition holds."""
    return f"""
def bytes_per_rank(n_params, world_size, stage):
    P, N = n_params, world_size
    return {{
        "parameters": 2 * P / (N if {parameters} else 1),
        "gradients": 2 * P / (N if {gradients} else 1),
        "optimizer": 12 * P / (N if {optimizer} else 1),
    }}
"""


def cut(body: str) -> str:
    return f"""
def to_shards(tensors, world_size):
    import torch
    N = world_size
    flat = torch.cat([t.flatten() for t in tensors])
    pad = flat.new_zeros(-len(flat) % N)
    return {body}
"""


def clip(factor: str) -> str:
    return f"""
def clip_shards(shards, max_norm):
    import torch
    norms = torch.stack([s.norm() for s in shards])
    return [s * torch.as_tensor({factor}).clamp(max=1.0) for s in shards]
"""


def rows(body: str) -> str:
    return f"""
def rows_on_rank(n_rows, world_size, rank):
    size = -(-n_rows // world_size)
    return {body}
"""


WRONG = {
    "bytes_per_rank": [
        ("no float32 copy", bill().replace("12 *", "8 *"), "stage 0.*takes 4 more"),
        ("never divided", bill("0", "0", "0"), "stage 1.*optimizer are whole; .*from stage 1"),
        ("always divided", bill("1", "1", "1"), "stage 0.*shares out nothing"),
        ("the bill of float32", bill().replace("12 *", "8 *").replace("2 *", "4 *"), "takes 4 more"),
        ("4 bytes of gradients", bill().replace('"gradients": 2', '"gradients": 4'), "stage 0.*gradients.*float32"),
        (
            "copy not shared",
            bill().replace("12 * P / (N if stage >= 1 else 1)", "4 * P + 8 * P / (N if stage >= 1 else 1)"),
            "copy is shared out as well",
        ),
        ("all at once", bill("stage", "stage", "stage"), "stage 1 does not share out the gradients"),
        ("gradients a stage early", bill(gradients="stage >= 1"), "stage 1 does not share out the gradients"),
        ("stages 2 and 3 swapped", bill("stage >= 2", "stage >= 3"), "stage 2.*gradients are whole"),
        ("small parts first", bill("stage >= 1", "stage >= 2", "stage >= 3"), "stage 1.*optimizer are whole"),
        ("no stage 3", bill("stage >= 4"), "stage 3.*parameters are whole; .*from stage 3"),
        ("whole division", bill().replace("/", "//"), "10 parameters, 3 processes.*expected"),
        ("one sum", "def bytes_per_rank(n_params, world_size, stage):\n    return 16.0", "a float, expected a dict"),
        ("a part is missing", bill().replace('"optimizer"', '"adam"'), "the parts are .*adam.*expected"),
    ],
    "to_shards": [
        ("no padding", cut("list(flat.chunk(N))"), "takes pieces of one length"),
        ("cut off", cut("list(flat[: len(flat) // N * N].view(N, -1))"), "fell off the end"),
        ("zeros in front", cut("list(torch.cat([pad, flat]).view(N, -1))"), "the zero stands in front"),
        ("dealt out", cut("[torch.cat([flat, pad])[r::N] for r in range(N)]"), "dealt out like cards"),
        (
            "always padded",
            cut("list(torch.cat([flat, flat.new_zeros(N - len(flat) % N)]).view(N, -1))"),
            "4 numbers on 4 processes.* shape",
        ),
        ("padded too far", cut("list(torch.cat([flat, pad, flat.new_zeros(N)]).view(N, -1))"), "no more padding"),
        ("one tensor", cut("torch.cat([flat, pad])"), "a tensor, expected a list of 3"),
        (
            "each padded and cut",
            cut(
                "[torch.cat([torch.cat([t.flatten(), t.new_zeros(-t.numel() % N)]).view(N, -1)[r] for t in tensors]) "
                "for r in range(N)]"
            ),
            "lay all of them end to end first, and pad once",
        ),
        (
            "each padded, then all cut",
            cut(
                "list(torch.cat([torch.cat([t.flatten(), t.new_zeros(-t.numel() % N)]) for t in tensors]).view(N, -1))"
            ),
            "lay all of them end to end first, and pad once",
        ),
        ("each tensor for itself", cut("[t.flatten() for t in tensors]"), "2 shards for 3 processes"),
        ("by rows", cut("[torch.cat([flat, pad]).view(N, 1, -1)[r] for r in range(N)]"), "each shard is flat"),
        ("padded with ones", cut("list(torch.cat([flat, pad + 1]).view(N, -1))"), "the shard of rank 2"),
    ],
    "clip_shards": [
        ("by its own norm", clip("max_norm / s.norm()"), "each by a norm of its own"),
        ("sum of norms", clip("max_norm / norms.sum()"), "squares add up, norms don't"),
        ("mean of norms", clip("max_norm / norms.mean()"), "mean of the shards' norms|nothing is clipped"),
        ("no root", clip("max_norm / (norms**2).sum()"), "take its root"),
        ("largest norm", clip("max_norm / norms.max()"), "largest norm of a shard"),
        ("mean of squares", clip("max_norm / (norms**2).mean().sqrt()"), "mean of the squares"),
        ("rank 0's", clip("max_norm / (2 * norms[0])").replace(".clamp(max=1.0)", ""), "expected|divide"),
        (
            "makes it longer",
            clip("max_norm / norms.norm()").replace(".clamp(max=1.0)", ""),
            "only ever shortens",
        ),
        (
            "each number for itself",
            "def clip_shards(shards, max_norm):\n    return [s.clamp(-max_norm, max_norm) for s in shards]",
            "limit for the norm of the whole",
        ),
        (
            "nothing over nothing",
            "def clip_shards(shards, max_norm):\n"
            "    norm = sum(s.square().sum() for s in shards).sqrt()\n"
            "    return [s / norm * norm.clamp(max=max_norm) for s in shards]",
            "becomes NaN",
        ),
        (
            "divided by zero",
            "def clip_shards(shards, max_norm):\n"
            "    norm = sum(s.square().sum() for s in shards).sqrt().item()\n"
            "    return [s * min(1.0, max_norm / norm) for s in shards]",
            "ZeroDivisionError",
        ),
        ("never", clip("1.0"), "nothing is clipped"),
    ],
    "rows_on_rank": [
        (
            "evenly",
            rows("(n_rows * rank // world_size, n_rows * (rank + 1) // world_size)"),
            "share out evenly, .*as the rows of a batch are",
        ),
        ("past the end", rows("(rank * size, (rank + 1) * size)"), "more than there are"),
        (
            "rounded down",
            rows("(rank * (n_rows // world_size), (rank + 1) * (n_rows // world_size))"),
            "belong to nobody",
        ),
        (
            "the rest to the last",
            rows(
                "(rank * (n_rows // world_size), n_rows if rank == world_size - 1 "
                "else (rank + 1) * (n_rows // world_size))"
            ),
            r"you give them \[2, 2, 2, 4\]|share out evenly",
        ),
        ("less than nothing", rows("(rank * size, min(n_rows, (rank + 1) * size))"), "the run is empty"),
        ("a length", rows("(min(n_rows, rank * size), size)"), "rows"),
        ("end included", rows("(rank * size, (rank + 1) * size - 1)"), "the end is not included"),
        ("from the back", rows("(n_rows - (rank + 1) * size, n_rows - rank * size)"), "expected 0 to|more than"),
        ("no pair", rows("size"), "two whole numbers"),
    ],
}

TestExercises = exercise_tests("12", WRONG)
