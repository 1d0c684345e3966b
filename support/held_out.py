"""Evaluation of a tuned model on held-out chats or pairs: likelihoods, and answers of its own.

An Example and a Pair are those of adapt.py.
"""

import math

import torch
from torch.nn.utils.rnn import pad_sequence

from model import sequence_log_probs
from scaling.ranks import reduce_sum
from scaling.sharding import evaluating
from support.answers import answer_prompts
from support.memory import Half, remedied
from support.packing import NO_TARGET
from support.progress import progress
from support.rows import sequences_of
from support.scoring import length_batches, own_batches


def evaluate_held_out(model, tokenizer, eval_set, reference, adapt_config, eval_config, dpo_loss):
    """{tuned: {metric: number}, samples: the first three answers}; {} without a held-out set.

    reference: of the Pairs of eval_set, float64 (N, 2). dpo_loss: adapt.dpo_loss.
    """
    if not eval_set:
        return {}
    results = {}
    # 1. How likely are the held-out answers, or the preferred ones of two?
    batch_tokens = eval_config.eval_batch_tokens
    progress.begin("held-out answers")
    if adapt_config.method == "sft":
        tuned = evaluate_chats(model, eval_set, batch_tokens)
    else:
        tuned = evaluate_pairs(model, eval_set, reference, batch_tokens, adapt_config, dpo_loss)
    # 2. What does the model answer by itself? (greedily: each time the likeliest token)
    prompts = held_out_prompts(sequences_of(eval_set), model.config.max_seq_len,
                               adapt_config.eval_answers)
    if prompts:
        progress.begin("answers of its own")
        texts, tuned["ended"] = answer_prompts(model, tokenizer, prompts,
                                               eval_config.max_new_tokens)
        results["samples"] = texts[:3]
    progress.begin("")
    results["tuned"] = tuned
    return results


def evaluate_chats(model, examples, batch_tokens):
    """{loss, loss_error}: nats per trained token of held-out chats."""
    log_probs, counts = completion_log_probs(model, examples, batch_tokens).T
    loss, error = mean_and_error(-log_probs, counts)
    return {"loss": loss, "loss_error": error}


def evaluate_pairs(model, pairs, reference, batch_tokens, config, dpo_loss):
    """{dpo_loss, accuracy, accuracy_error, reward_accuracy, reward_margin} of held-out pairs.

    accuracy: how often the policy itself finds the chosen answer likelier than the rejected one.
    reward_accuracy: how often it does so more than the reference does.
    """
    found = completion_log_probs(model, sequences_of(pairs), batch_tokens)
    log_probs, counts = found.T
    policy = log_probs.view(2, -1)  # (2, N): chosen, rejected
    reference = torch.from_numpy(reference).T
    right = (policy[0] > policy[1]).double()
    accuracy, error = mean_and_error(right, torch.ones_like(right))
    if config.length_normalized:
        counts = counts.view(2, -1)
        policy = policy / counts
        reference = reference / counts
    loss, metrics = dpo_loss(policy[0], policy[1], reference[0], reference[1], config.beta)
    return {
        "dpo_loss": loss.item(),
        "accuracy": accuracy,
        "accuracy_error": error,
        "reward_accuracy": metrics["rewards/accuracies"].item(),
        "reward_margin": metrics["rewards/margins"].item(),
    }


# ---- Likelihoods ---------------------------------------------------------------------------------

def completion_log_probs(model, sequences, batch_tokens):
    """Float64 (N, 2): log-probability in nats of each Example's trained tokens, and their number.

    The ranks share the forwards; every rank gets all rows.
    """
    found = torch.zeros(len(sequences), 2, dtype=torch.float64)
    numbers = range(len(sequences))
    batches = length_batches(numbers, batch_tokens, lambda i: len(sequences[i].ids))
    less = Half("eval_batch_tokens", batch_tokens, model.config.max_seq_len)
    with remedied("in an evaluation", less), evaluating(model):
        for numbers, counts in own_batches(batches):
            examples = [sequences[i] for i in numbers]
            log_probs = log_probs_of_batch(model, examples)
            if counts:
                found[numbers] = log_probs
    return reduce_sum(found)


def log_probs_of_batch(model, examples):
    """The rows of `completion_log_probs` for some Examples, in one forward."""
    ids = [torch.from_numpy(example.ids).long() for example in examples]
    trained = [torch.from_numpy(example.trained) for example in examples]
    # causal attention never sees the padding on the right, so no mask is needed
    ids = pad_sequence(ids, batch_first=True, padding_value=model.config.pad_token_id)
    trained = pad_sequence(trained, batch_first=True, padding_value=False)
    # a target is the next id; the first id, EOS in place of BOS, is never trained
    loss_mask = trained.roll(-1, dims=1)
    targets = ids.roll(-1, dims=1).where(loss_mask, NO_TARGET)
    device = model.wte.weight.device
    token_losses = model(ids.to(device), targets=targets.to(device))
    log_probs, counts = sequence_log_probs(token_losses, loss_mask.to(device))
    return torch.stack([log_probs, counts], dim=1).cpu().double()


def mean_and_error(sums, counts):
    """Returns (mean, error): total of sums / total of counts, (N,) each, and its standard error.

    The N examples were drawn, not their tokens, so the error is that of a ratio of two totals.
    """
    n = len(sums)
    total = counts.sum().item()
    mean = sums.sum().item() / total
    residuals = sums - mean * counts
    squares = residuals.square().sum().item()
    variance = squares * n / max(1, n - 1)
    return mean, math.sqrt(variance) / total


# ---- Prompts -------------------------------------------------------------------------------------

def held_out_prompts(sequences, max_seq_len, at_most):
    """Up to `at_most` different prompts, as ids, from all over a set of Examples."""
    prompts = []
    for example in sequences:
        if example.prompt < max_seq_len:  # or no token of an answer would fit
            prompts.append(tuple(example.ids[:example.prompt].tolist()))
    prompts = list(dict.fromkeys(prompts))
    if not prompts or not at_most:
        return []
    return prompts[::math.ceil(len(prompts) / at_most)]
