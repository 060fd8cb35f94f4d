"""Many to many: one sequence becomes another, by an encoder, a decoder, attention and beam search.

    python tests/examples/seq2seq.py

learns in a few seconds to rewrite dates ("3 march 1994" -> "1994-03-03"), and prints what it makes
of held-out ones, and where it looks while it writes.
"""

import math
import random
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of rnn.py
import rnn

# Padding, and what stands at the beginning and at the end of a target: the first symbols of the
# vocabulary, as in rnn.Vocab(SPECIALS + sorted(set(text))).
SPECIALS = ["<pad>", "<bos>", "<eos>"]
PAD, BOS, EOS = range(3)


class Seq2Seq(nn.Module):
    """An encoder reads the source in both directions; a decoder, which starts from the encoder's
    last states, predicts the target symbol by symbol. At each step attention (Luong et al. 2015)
    chooses where in the source to read: with q the decoder's hidden state and m_t the encoder's at
    source step t, both H wide,

        weights = softmax over t of (W q) . m_t     h~ = tanh(W_mix [q, sum of weights * m_t] + b)

    and the output reads h~. Source and target share one vocabulary, which begins with SPECIALS.

    cell: the class of the layers. hidden: H, of which each direction of the encoder has a half.
    T is the length of the longest source, M that of the longest target."""

    def __init__(self, vocab_size, embed=64, hidden=128, layers=1, cell=rnn.LSTM, dropout=0.0):
        super().__init__()
        if hidden % 2:
            raise ValueError(f"hidden must be even, half for each direction, got {hidden}")
        options = dict(batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.embedding = nn.Embedding(vocab_size, embed, padding_idx=PAD)
        self.encoder = cell(embed, hidden // 2, layers, bidirectional=True, **options)
        self.decoder = cell(embed, hidden, layers, **options)
        self.drop = nn.Dropout(dropout)
        self.query = nn.Linear(hidden, hidden, bias=False)
        self.mix = nn.Linear(2 * hidden, hidden)
        self.output = nn.Linear(hidden, vocab_size)

    def encode(self, source, lengths):
        """source (B, T), lengths (B,) -> memory (B, T, H), where it is valid (B, T), and the state
        that the decoder starts from. Raises ValueError for lengths that do not fit."""
        T, lengths = source.shape[1], torch.as_tensor(lengths).cpu()
        if lengths.shape != source.shape[:1] or not ((lengths >= 1) & (lengths <= T)).all():
            raise ValueError(f"lengths should be {len(source)} numbers from 1 to {T}, "
                             f"got {lengths.tolist()}")
        x = self.drop(self.embedding(source))  # (B, T, I)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        memory, state = self.encoder(packed)
        memory, _ = pad_packed_sequence(memory, batch_first=True, total_length=T)  # (B, T, H)
        valid = (torch.arange(T) < lengths[:, None]).to(source.device)  # (B, T)
        # Both directions of a layer side by side: (layers * 2, B, H / 2) -> (layers, B, H).
        state = rnn.map_state(lambda s: torch.cat((s[0::2], s[1::2]), dim=-1), state)
        return memory, valid, state

    def decode(self, ids, memory, valid, state):
        """The next M symbols, ids (B, M) -> logits (B, M, V), weights (B, M, T), state."""
        q, state = self.decoder(self.drop(self.embedding(ids)), state)  # (B, M, H)
        scores = self.query(q) @ memory.transpose(1, 2)  # (B, M, T)
        weights = scores.masked_fill(~valid[:, None], -math.inf).softmax(dim=-1)
        h = self.mix(torch.cat((q, weights @ memory), dim=-1)).tanh()  # (B, M, H)
        return self.output(self.drop(h)), weights, state

    def forward(self, source, lengths, target):
        """Teacher forcing: the decoder reads target (B, M), from BOS on, whatever it predicts.
        Returns logits (B, M, V), each of the symbol after, and weights (B, M, T)."""
        return self.decode(target, *self.encode(source, lengths))[:2]

    def translate(self, source, lengths, beam=1, length=100):
        """The decoder reads its own output, to EOS or for `length` symbols. beam: the number of
        targets, the likeliest so far, that are kept at every step; 1 is greedy. Returns the best
        target of each source: ids (B, M), all EOS after its end; ln of its probability (B,);
        weights (B, M, T). Raises ValueError for a beam or length below 1."""
        if beam < 1 or length < 1:
            raise ValueError(f"beam and length must be at least 1, got {beam} and {length}")
        with rnn.evaluating(self):
            memory, valid, state = self.encode(source, lengths)
            B, T = source.shape
            # Each source gets `beam` rows, one below the other. They begin alike, and would all
            # choose alike, so at first only one of them has a chance.
            memory, valid = (m.repeat_interleave(beam, dim=0) for m in (memory, valid))
            state = rnn.map_state(lambda s: s.repeat_interleave(beam, dim=1), state)
            ids = source.new_full((B * beam, 1), BOS)
            weights = memory.new_empty(B * beam, 0, T)
            total = memory.new_full((B, beam), -math.inf)
            total[:, 0] = 0.0
            for _ in range(length):
                logits, looks, state = self.decode(ids[:, -1:], memory, valid, state)
                logp = logits[:, -1].log_softmax(dim=-1)  # (B * beam, V)
                V = logp.shape[-1]
                ended = ids[:, -1] == EOS  # these continue with EOS for certain: nothing changes
                logp[ended] = -math.inf
                logp[ended, EOS] = 0.0
                total = (total[..., None] + logp.view(B, beam, V)).flatten(1)  # (B, beam * V)
                total, best = total.topk(beam)  # (B, beam) each; best: row * V + symbol
                first = torch.arange(B, device=best.device)[:, None] * beam  # each source's row 0
                rows = (first + best // V).flatten()  # those that are continued, (B * beam,)
                ids = torch.cat((ids[rows], (best % V).view(-1, 1)), dim=1)
                weights = torch.cat((weights[rows], looks[rows]), dim=1)
                state = rnn.map_state(lambda s: s[:, rows], state)
                if (ids[::beam, -1] == EOS).all():  # every best one has ended; totals only fall
                    break
        return ids[::beam, 1:], total[:, 0], weights[::beam]


MONTHS = ["january", "february", "march", "april", "may", "june", "july", "august", "september",
          "october", "november", "december"]


def dates(number, seed):
    """Pairs such as ("3 march 1994", "1994-03-03")."""
    chance = random.Random(seed)
    made = [(chance.randint(1, 28), chance.randrange(12), chance.randint(1900, 2099))
            for _ in range(number)]
    return [(f"{day} {MONTHS[month]} {year}", f"{year}-{month + 1:02}-{day:02}")
            for day, month, year in made]


def tensors(vocab, pairs):
    """Sources (B, T), padded, their lengths (B,), and targets (B, M), from BOS to EOS, padded."""
    sources = [vocab.encode(source) for source, _ in pairs]
    targets = [F.pad(F.pad(vocab.encode(target), (1, 0), value=BOS), (0, 1), value=EOS)
               for _, target in pairs]
    return (pad_sequence(sources, batch_first=True, padding_value=PAD),
            torch.tensor([len(ids) for ids in sources]),
            pad_sequence(targets, batch_first=True, padding_value=PAD))


def main(steps=200):
    pairs = dates(2200, seed=0)
    vocab = rnn.Vocab(SPECIALS + sorted(set("".join(map("".join, pairs)))))
    source, lengths, target = tensors(vocab, pairs)
    torch.manual_seed(0)
    model = rnn.initialize(Seq2Seq(len(vocab), embed=32, hidden=64, cell=rnn.GRU))
    optimizer = rnn.make_optimizer(model)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rnn.learning_rate(0.01, 20, step, step / steps)
        rows = torch.randint(2000, (64,))
        logits, _ = model(source[rows], lengths[rows], target[rows, :-1])  # (B, M, V)
        loss = F.cross_entropy(logits.flatten(0, 1), target[rows, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    ids, logp, weights = model.translate(source[2000:], lengths[2000:], beam=3, length=12)
    right = (F.pad(ids, (0, 11 - ids.shape[1]), value=EOS) == target[2000:, 1:]).all(1)
    print(f"{right.double().mean():.1%} of 200 held-out dates are right")
    for k in range(3):
        text = vocab.decode(ids[k]).replace("<eos>", "")
        print(f"{pairs[2000 + k][0]} -> {text}    probability {logp[k].exp():.3f}")
    print("where it looks: a row for each symbol that it writes, darker for larger weights")
    show = weights[0, :10, : lengths[2000]]  # (10, T)
    print("   " + pairs[2000][0])
    for symbol, row in zip(vocab.decode(ids[0]), show):
        print(f" {symbol} " + "".join(" .:*#"[min(4, int(w * 5))] for w in row))


if __name__ == "__main__":
    main()
