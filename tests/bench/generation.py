"""The bench of generation: `generate`."""

import json
import tempfile
import time
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from model import ModelConfig, build_model, generate_stream
from scaling.machine import choose_device, keep_freed_memory
from support.cpu import use_fast_attention
from support.generation import fixed_weights
from support.weights import save_hf

TINY = ModelConfig()
CASES = [  # (dtype, batch, ids of a prompt, new ids)
    (torch.float32, 1, 32, 200), (torch.float32, 32, 32, 200), (torch.bfloat16, 1, 32, 200),
    (torch.bfloat16, 32, 32, 200), (torch.float32, 1, 2000, 48), (torch.bfloat16, 1, 2000, 48),
    (torch.float32, 8, 2000, 48)]
ROUNDS = 5
COLUMNS = ("dtype", "batch", "cached", "tokens/s, nanOLMo", "transformers", "ratio (range)",
           "first token, ms, nanOLMo", "transformers", "ratio (range)", "equal ids")


def bench_generate(cases=CASES, rounds=ROUNDS):
    """Greedy answers of the tiny shape against transformers' `generate`.

    The bars: twice its tokens/s at batch 1 and 32, 1.5 times with 2,000 tokens in the cache, the
    first token never later. In float32 the ids must be the same; in bfloat16 both round, each
    differently. The weights are untrained and doubled, so that two ids are rarely nearly as likely.
    tokens/s: of the ids after the first; medians, as are the ratios of the rounds.
    """
    keep_freed_memory()
    device = choose_device()
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    figures = []
    for dtype, batch, length, new in cases:
        ours, theirs = models(dtype, length + new, device)
        generator = torch.Generator().manual_seed(0)
        prompts = torch.randint(TINY.vocab_size - 8, (batch, length), generator=generator)
        sides = [partial(our_answers, ours, prompts, new),
                 partial(their_answers, theirs, prompts, new)]
        found = run_in_turns(sides, rounds)
        same = [a == b for a, b in zip(found[0][0][0], found[1][0][0], strict=True)]
        if dtype == torch.float32 and not all(same):
            raise SystemExit("the two sides give different ids, so their speeds do not compare")
        row = {"dtype": str(dtype).removeprefix("torch."), "batch": batch, "cached": length,
               **figures_of(found, batch), "equal": round(sum(same) / len(same), 4)}
        figures.append(row)
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(),
                      "device": str(device), "generate": figures}))


def models(dtype, max_seq_len, device):
    """The same weights as our model and as transformers', both in `dtype`."""
    from transformers import OlmoForCausalLM
    ours = build_model(replace(TINY, max_seq_len=max(256, max_seq_len)), seed=0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(2)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(ours, folder)
        theirs = OlmoForCausalLM.from_pretrained(folder).eval()
    theirs.generation_config.eos_token_id = None
    use_fast_attention(ours)
    return ours.to(device, dtype), theirs.to(device, dtype)


def run_in_turns(sides, rounds):
    """For each side its rounds' (ids, seconds of each token), after a round to warm up."""
    found = [[], []]
    for i in range(rounds + 1):
        for side in (0, 1) if i % 2 else (1, 0):
            answer = sides[side]()
            if i > 0:
                found[side].append(answer)
    return found


def our_answers(model, prompts, new):
    """Returns (ids in the order in which they came, the seconds that each token took)."""
    ids = []
    stamps = [time.perf_counter()]
    with fixed_weights(model):
        for chosen in generate_stream(model, prompts.tolist(), new):
            stamps.append(time.perf_counter())
            ids += chosen.values()
    return ids, differences(stamps)


def their_answers(model, prompts, new):
    """The same of transformers: a logits processor is called once for each token."""
    stamps = [time.perf_counter()]

    def stamp(ids, scores):
        scores.sum().item()  # the device has computed them
        stamps.append(time.perf_counter())
        return scores
    prompts = prompts.to(model.device)
    rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False,
                          max_new_tokens=new, pad_token_id=TINY.pad_token_id,
                          logits_processor=[stamp])
    return rows[:, prompts.shape[1]:].T.flatten().tolist(), differences(stamps)


def differences(stamps):
    return [after - before for before, after in zip(stamps, stamps[1:], strict=False)]


def figures_of(found, batch):
    """The columns of a row from the rounds of both sides."""
    row = {}
    for name, pick in (("token", lambda seconds: median(seconds[1:])), ("first", lambda s: s[0])):
        ours, theirs = ([pick(seconds) for _, seconds in side] for side in found)
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        for side, times in (("ours", ours), ("theirs", theirs)):
            time_of_one = median(times)
            row[f"{name} {side}"] = (round(batch / time_of_one) if name == "token"
                                     else round(1e3 * time_of_one, 2))
        row[f"{name} ratio"] = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return row
