"""From the last layer's output to the answer: logits, log-probabilities, and the probability of one
token with its gradient, without ever holding the logits of all rows.

Shapes: Q queries, P rows a query, R rows, K tokens, d residual width, V vocabulary.
"""

import torch

LOGITS = 2**23  # logits held at once in `token_scores`
# Of the unembedding at a time, and rows: on a CPU both together fit a core's cache.
VOCAB_CHUNK = {"cpu": 1024, "cuda": 16384}
ROW_CHUNK = {"cpu": 256, "cuda": 2**20}


def final_hidden(lm, hidden):
    """From the last layer's output to the unembedding's input."""
    for module in lm.arch.tail:
        hidden = module(hidden)
    return hidden


def final_logits(lm, hidden):
    """(..., V) logits, float32 at least, from the last layer's output (..., d)."""
    raw = lm.arch.head(final_hidden(lm, hidden)).to(lm.score_dtype)
    return _to_logits(raw, lm.arch)[0]


def token_scores(lm, hidden, target):
    """For the last layer's output `hidden` (K, d): log-probabilities (K,) of the tokens `target`
    (K,), and the most probable tokens (K,)."""
    size = max(1, LOGITS // lm.arch.head.weight.shape[0])
    log_p = []
    best = []
    for part, token in zip(hidden.split(size), target.split(size)):
        logits = final_logits(lm, part)
        log_p.append(logits.gather(1, token[:, None])[:, 0] - torch.logsumexp(logits, -1))
        best.append(logits.argmax(-1))
    return torch.cat(log_p), torch.cat(best)


def answer_probabilities(lm, hidden, target, need_grad):
    """(Q, P) probabilities of each query's answer token `target` (Q,) for the last layer's output
    `hidden` (Q, P, d)."""
    queries, rows, _ = hidden.shape
    flat = final_hidden(lm, hidden).flatten(0, 1)
    p = token_probabilities(lm, flat, target.repeat_interleave(rows), need_grad)
    return p.view(queries, rows)


def token_probabilities(lm, final, target, need_grad=False):
    """p_y = softmax(logits(h))_y for the unembedding's inputs h = `final` (R, d) and one token y of
    `target` (R,) a row, with its analytic gradient if `need_grad`

        dp_y/dh = p_y (t'_y W_y - sum_v p_v t'_v W_v),

    t the map from the unembedding's output to logits.
    """
    size = ROW_CHUNK.get(final.device.type, 2**20)
    parts = zip(final.detach().split(size), target.split(size))
    p, gradients = zip(*(_probability(lm, hidden, own, need_grad) for hidden, own in parts))
    if not need_grad:
        return torch.cat(p)
    gradient = torch.cat(gradients)
    return torch.cat(p) + (gradient * (final - final.detach())).sum(-1)  # adds only the gradient


@torch.no_grad()
def _probability(lm, hidden, target, need_grad):
    """(R,) probabilities of the tokens `target` (R,) and, if needed, their gradients (R, d).

    Sums over the vocabulary run in chunks with a running maximum, so no (R, V) matrix is kept. They
    leave out the target, whose own terms of the gradient cancel: where its probability is nearly 1,
    their difference would be nothing but rounding.
    """
    weight = lm.arch.head.weight
    dtype = lm.score_dtype
    own = weight[target].to(dtype)
    target = target[:, None]
    answer, own_slope = _logits(lm, (hidden.to(dtype) * own).sum(-1, keepdim=True), target)
    top = answer
    others = torch.zeros_like(top)  # sum_v exp(logit_v - top)
    mean = torch.zeros_like(own)  # sum_v exp(logit_v - top) t'_v W_v
    size = VOCAB_CHUNK.get(hidden.device.type, 8192)
    for start in range(0, weight.shape[0], size):
        chunk = slice(start, start + size)
        z, slope = _logits(lm, _matmul(hidden, weight[chunk].T, dtype), chunk)
        place = (target - start).clamp(0, z.shape[1] - 1)
        left = z.gather(1, place).masked_fill(place == target - start, float("-inf"))
        z.scatter_(1, place, left)
        new_top = torch.maximum(top, z.amax(-1, keepdim=True))
        shrink = (top - new_top).exp_()
        z = z.sub_(new_top).exp_()
        others = others.mul_(shrink).add_(z.sum(-1, keepdim=True))
        if need_grad:
            z = z.mul_(slope).to(weight.dtype)
            mean = mean.mul_(shrink).add_(_matmul(z, weight[chunk], dtype))
        top = new_top
    answer = (answer - top).exp_()
    total = answer + others
    p = answer / total  # (R, 1)
    return p[:, 0], p * (own * own_slope * others - mean).div_(total)


def _logits(lm, z, tokens):
    """`_to_logits` of the products `z` of hidden states with the unembedding's rows `tokens`."""
    bias = getattr(lm.arch.head, "bias", None)
    return _to_logits(z if bias is None else z + bias[tokens], lm.arch)


def _matmul(a, b, dtype):
    """a @ b accumulated and returned in `dtype`, without rounding the result to bfloat16 in
    between."""
    if a.dtype == b.dtype == dtype:
        return a @ b
    if a.is_cuda and a.dtype == b.dtype:
        try:
            return torch.mm(a, b, out_dtype=dtype)
        except TypeError:  # torch before 2.8
            pass
    return a.to(dtype) @ b.to(dtype)


def _to_logits(z, arch):
    """Logits from the unembedding's output `z`, and the slope of that map."""
    if arch.scale != 1.0:
        z = z * arch.scale
    if arch.softcap is None:
        return z, arch.scale
    squashed = torch.tanh(z / arch.softcap)
    return arch.softcap * squashed, arch.scale * (1 - squashed**2)
