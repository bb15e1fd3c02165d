"""The rivals inside the decoder a second time, from their description: one sample, full attention maps, plain loops."""

import math

import torch

from tests.support.small_models import IMAGE_TOKEN_ID, Sample


def embeddings_of(model, sample: Sample, ids: torch.Tensor) -> torch.Tensor:
    """What enters the decoder, [T, D]; `ids` may go on after those of the sample."""
    embeddings = model.get_input_embeddings()(ids).clone()
    if sample.pixel_values is not None:
        images = model.model.encode_images(sample.pixel_values, sample.crop_counts)
        embeddings[ids == IMAGE_TOKEN_ID] = torch.cat(list(images))
    return embeddings


def turned(states: torch.Tensor, model, positions: torch.Tensor) -> torch.Tensor:
    """States [H, T, E] with rotary positions."""
    cosine, sine = (table[0] for table in model.model.language_model.rotary_emb(states[None, 0], positions[None]))
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine


def attention_map(model, layer, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """[H, T, T], after the softmax."""
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    heads, groups = (
        projection(normed).view(len(x), -1, attention.head_dim) for projection in (attention.q_proj, attention.k_proj)
    )
    if hasattr(attention, "q_norm"):
        heads, groups = attention.q_norm(heads), attention.k_norm(groups)
    queries, keys = (turned(states.transpose(0, 1), model, positions) for states in (heads, groups))
    keys = keys.repeat_interleave(len(queries) // len(keys), dim=0)
    logits = queries @ keys.transpose(1, 2) / math.sqrt(attention.head_dim)
    return logits.masked_fill(~torch.ones(len(x), len(x)).tril().bool(), -torch.inf).softmax(-1)


def run_layer(model, layer, x: torch.Tensor, positions: torch.Tensor, moving: torch.Tensor | None = None):
    """A decoder layer on [T, D]; only the tokens of `moving` [T] bool change."""
    attention, probabilities = layer.self_attn, attention_map(model, layer, x, positions)
    values = attention.v_proj(layer.input_layernorm(x)).view(len(x), -1, attention.head_dim).transpose(0, 1)
    values = values.repeat_interleave(len(probabilities) // len(values), dim=0)
    mixed = (probabilities @ values).transpose(0, 1).flatten(1)
    y = x + attention.o_proj(mixed)
    y = y + layer.mlp(layer.post_attention_layernorm(y))
    return y if moving is None else torch.where(moving[:, None], y, x)


def finish(model, x: torch.Tensor, places: list[int | None], length: int) -> torch.Tensor:
    """Logits [T, V] of the tokens that are left; NaN for dropped ones."""
    logits = torch.full((length, model.config.text_config.vocab_size), torch.nan)
    for row, place in enumerate(places):
        if place is not None:
            logits[place] = model.lm_head(model.model.language_model.norm(x[row]))
    return logits


def share_of(kept: int, tokens: int, images: int) -> int:
    """How many of `images` image tokens stay if `kept` of `tokens` do."""
    return math.floor(images * kept / tokens + 0.5)


def fastv(model, embeddings, ids, asking: list[int], first_layer: int, kept: int):
    """Logits; `asking` has the last prompt token."""
    x, places = embeddings, list(range(len(ids)))
    positions, maps = torch.arange(len(ids)), None
    for number, layer in enumerate(model.model.language_model.layers):
        if number == first_layer:
            scores = maps.mean(0)[asking[0]]
            images = [n for n in places if ids[n] == IMAGE_TOKEN_ID]
            best = sorted(images, key=lambda n: -scores[n].item())[: share_of(kept, 16, len(images))]
            places = [n for n in places if ids[n] != IMAGE_TOKEN_ID or n in best]
            x, positions = x[places], torch.tensor(places)
        maps = attention_map(model, layer, x, positions)
        x = run_layer(model, layer, x, positions)
    return finish(model, x, places, len(ids))


def pyramiddrop(model, embeddings, ids, asking: list[int], kept: dict[int, int]):
    """Logits; `kept` has, for each layer with a cut before it, the number for 16 tokens."""
    x, places = embeddings, list(range(len(ids)))
    total = int((ids == IMAGE_TOKEN_ID).sum())
    for number, layer in enumerate(model.model.language_model.layers):
        if number in kept:
            maps = attention_map(model, layer, x, torch.arange(len(x)))
            scores = maps.mean(0)[[places.index(row) for row in asking]].mean(0)
            images = [row for row, n in enumerate(places) if ids[n] == IMAGE_TOKEN_ID]
            best = sorted(images, key=lambda row: -scores[row].item())[: share_of(kept[number], 16, total)]
            rows = [row for row, n in enumerate(places) if ids[n] != IMAGE_TOKEN_ID or row in best]
            x, places = x[rows], [places[row] for row in rows]
        x = run_layer(model, layer, x, torch.arange(len(x)))
    return finish(model, x, places, len(ids))


def raters_of(embeddings, ids, prompt: int) -> list[int]:
    images = [n for n in range(prompt) if ids[n] == IMAGE_TOKEN_ID]
    text = [n for n in range(prompt) if ids[n] != IMAGE_TOKEN_ID and n > images[0]]
    weights = (embeddings[images] @ embeddings[text].T).softmax(dim=1).mean(dim=0)
    chosen = [n for n, weight in zip(text, weights, strict=True) if weight > weights.mean()]
    return chosen or text


def clustered(tokens: torch.Tensor, groups: int) -> torch.Tensor:
    """Means of the clusters [groups, D] of tokens [n, D] by density peaks, one loop for each quantity."""
    size = len(tokens)
    distance = [[float((a - b).norm()) / math.sqrt(tokens.shape[1]) for b in tokens] for a in tokens]
    density = [math.exp(-sum(d**2 for d in sorted(row)[:groups]) / groups) for row in distance]
    largest = max(max(row) for row in distance)
    apart = [
        min([distance[i][j] for j in range(size) if density[j] > density[i]], default=largest) for i in range(size)
    ]
    centres = sorted(range(size), key=lambda i: -apart[i] * density[i])[:groups]
    group = [
        centres.index(i) if i in centres else min(range(groups), key=lambda c: distance[i][centres[c]])
        for i in range(size)
    ]
    return torch.stack([tokens[[i for i in range(size) if group[i] == c]].mean(0) for c in range(groups)])


def sparsevlm(model, embeddings, ids, prompt: int, kept: dict[int, int], plus: bool):
    """Logits; `kept` has, for each layer with a cut behind it, the number for 16 tokens."""
    x, places = embeddings, list(range(len(ids)))
    raters, total = raters_of(embeddings, ids, prompt), int((ids == IMAGE_TOKEN_ID).sum())
    is_image, positions = (ids == IMAGE_TOKEN_ID).tolist(), torch.arange(len(ids))
    for number, layer in enumerate(model.model.language_model.layers):
        maps = attention_map(model, layer, x, positions)[:, [places.index(n) for n in raters]]
        x = run_layer(model, layer, x, positions)
        if number not in kept:
            continue
        images = [row for row, flag in enumerate(is_image) if flag]
        maps = maps[:, :, images]
        if plus:
            ones = turned(torch.ones(1, len(x), layer.self_attn.head_dim), model, positions)[0]
            kernel = ones @ ones.T / math.sqrt(layer.self_attn.head_dim)
            maps = maps / kernel[[places.index(n) for n in raters]][:, images]
            maps = maps[maps.sum((1, 2)).topk(max(1, round(len(maps) * 14 / 32))).indices]
        scores = dict(zip(images, maps.mean(0).mean(0).tolist(), strict=True))
        ranked = sorted(images, key=lambda row: -scores[row])
        count = max(1, min(share_of(kept[number], 16, total), len(images) - 1))
        rows = [row for row in range(len(x)) if not is_image[row] or row in ranked[:count]]
        end = max(images)
        before, behind = [row for row in rows if row <= end], [row for row in rows if row > end]
        gone = ranked[count:]
        merged = gone[: int(0.3 * len(gone)) + 1]
        new = x[:0] if plus else clustered(x[merged], int(len(merged) / 10) + 1)
        x = torch.cat([x[before], new, x[behind]])
        places = [places[row] for row in before] + [None] * len(new) + [places[row] for row in behind]
        is_image = [is_image[row] for row in before] + [True] * len(new) + [is_image[row] for row in behind]
        positions = positions[before + behind] if plus else torch.arange(len(x))
    return finish(model, x, places, len(ids))


def shortv(model, embeddings, ids, frozen: tuple[int, ...]):
    """Logits."""
    x, positions = embeddings, torch.arange(len(ids))
    for number, layer in enumerate(model.model.language_model.layers):
        x = run_layer(model, layer, x, positions, ids != IMAGE_TOKEN_ID if number in frozen else None)
    return finish(model, x, list(range(len(ids))), len(ids))
