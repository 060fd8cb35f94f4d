"""A page that shows what single cells of a trained character model do, after Karpathy et al. 2015:
held-out text, coloured by the cell that follows a feature of the text most closely.

    python tests/examples/page.py out/best.pt page.html
    python tests/examples/page.py out/best.pt page.html --data my.txt

takes a checkpoint of train_shakespeare.py, lets the model read the last tenth of the text, which
was held out in training, writes one HTML file that needs nothing else, and prints its name. Buttons
on the page choose what colours the text: a cell, the gate that keeps the state, or the surprise.
"""

import argparse
import hashlib
import html
import json
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of rnn.py
import rnn
import train_shakespeare

SCORED, SHOWN = 60_000, 1_500  # characters that cells are scored on, and that the page shows


def features(text):
    """What a cell may have learnt to track, as one number for every character of the text."""
    patterns = {
        "inside quotes": r""""[^"]+"|(?<!\w)'[A-Z](?:[^'\n]|\b'\b|\n(?!\n))*[,.!?;]'""",
        "inside a speaker's name": r"(?:\A|(?<=\n\n))[A-Z][^\n]*:$",
        "inside a question": r"[^.!?:]+\?"}
    found = {name: [0] * len(text) for name in patterns}
    for name, pattern in patterns.items():
        for match in re.finditer(pattern, text, re.M):
            found[name][match.start() : match.end()] = [1] * len(match.group())
    ends = {"position in the line": "\n".__eq__,
            "length of the sentence so far": ".!?:;".__contains__,
            "letters of the word so far": lambda symbol: not symbol.isalpha()}
    for name, is_end in ends.items():  # the number of characters since the last end
        found[name], count = [], 0
        for symbol in text:
            count = 0 if is_end(symbol) else count + 1
            found[name].append(count)
    return found


def listen(model, ids):
    """Let the network read ids (T,). Returns the activation of every cell, (T, layers * H), which
    is tanh(c) where there is a c, else h; the mean of the gate that keeps the state, f or z, (T,),
    or None if the cell has neither; and the surprise (T,), the nats that each symbol cost."""
    cells, gates, losses = [], [], []
    gate = "f" if model.rnn.states == 2 else "z"
    with rnn.evaluating(model):
        state = model.init_state(1)
        # In pieces, because a trace takes memory. following: the symbol after each one of a piece.
        for piece, following in zip(ids.split(1000), ids.roll(-1).split(1000)):
            h, state, traces = model.rnn.trace(model.embed(piece[:, None]), state)  # h (T, 1, H)
            seen = [t["c"].tanh() if "c" in t else t["h"] for t in traces]  # (T, 1, H) each
            cells.append(torch.cat(seen, dim=-1)[:, 0].cpu())
            if gate in traces[0]:
                gates.append(torch.cat([t[gate] for t in traces], -1).mean((1, 2)).cpu())
            losses.append(F.cross_entropy(model.output(h[:, 0]), following, reduction="none").cpu())
    surprise = torch.cat(losses).roll(1)  # of each symbol, not of the one after it
    surprise[0] = 0.0  # nothing predicts the first one
    return torch.cat(cells), torch.cat(gates) if gates else None, surprise


def choose(cells, found):
    """For every feature the cell that follows it most closely, by the correlation over the first
    half of the text. Returns a list of (feature, cell, correlation over the second half, which had
    no part in the choice), the clearest first, and the names of features too rare to tell."""
    chosen, rare = [], []
    half = len(cells) // 2

    def correlate(part, values):  # (T, cells), (T,) -> (cells,)
        x, y = part - part.mean(0), values - values.mean()
        return (x * y[:, None]).sum(0) / (x.norm(dim=0) * y.norm()).clamp_min(1e-12)

    for name, values in found.items():
        values = torch.tensor(values, dtype=torch.float32)
        if min(values[:half].count_nonzero(), values[half:].count_nonzero()) < 100:
            rare.append(name)
            continue
        cell = int(correlate(cells[:half], values[:half]).abs().argmax())
        chosen.append((name, cell, float(correlate(cells[half:], values[half:])[cell])))
    return sorted(chosen, key=lambda row: -abs(row[2])), rare


def curves(history):
    """The training curves, a list of (step, training loss, held-out loss), as an SVG picture."""
    if len(history) < 2:
        return "<p>The checkpoint has fewer than two evaluations: no curves.</p>"
    steps, *losses = zip(*history)
    low, high = min(map(min, losses)), max(map(max, losses))

    def place(step, loss):
        return 40 + 330 * step / steps[-1], 190 - 170 * (loss - low) / ((high - low) or 1)

    parts = []
    for k in range(5):
        step, loss = steps[-1] * k / 4, low + (high - low) * k / 4
        x, y = place(step, loss)
        parts.append(f'<path class="grid" d="M40 {y:.1f}h330"/><text x="34" y="{y + 4:.1f}" '
                     f'class="left">{loss:.2f}</text><text x="{x:.1f}" y="212">{step:,.0f}</text>')
    for name, values in zip(("training", "held-out"), losses):
        points = [(*place(step, loss), step, loss) for step, loss in zip(steps, values)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _, _ in points)
        dots = (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"><title>step {step:,}: {name} loss '
                f"{loss:.4f} nats</title></circle>" for x, y, step, loss in points)
        parts.append(f'<g class="{name}"><polyline points="{line}"/>{"".join(dots)}</g>')
    return f'<svg viewBox="0 0 400 220" role="img">{"".join(parts)}</svg>'


def mean_by_kind(gate, text):
    """A gate's mean (T,) at letters, spaces, line ends and marks, in words."""
    kinds = {"letters": str.isalpha, "spaces": " ".__eq__, "line ends": "\n".__eq__,
             "marks": lambda symbol: not symbol.isalnum() and not symbol.isspace()}
    places = {name: [k for k, symbol in enumerate(text) if is_one(symbol)]
              for name, is_one in kinds.items()}
    return ", ".join(f"{gate[at].mean():.2f} at {name}" for name, at in places.items() if at)


def make_page(model, history, ids, text, about):
    """The page as one str of HTML, of a text and its ids (T,)."""
    cells, gate, surprise = listen(model, ids)
    chosen, rare = choose(cells, features(text))
    half = len(cells) // 2  # the page shows the part on which the cells are judged, from a speech
    speech = text.find("\n\n", half, half + 1000)
    begin = half if speech < 0 else speech + 2
    part = slice(begin, begin + SHOWN)
    hidden, lstm = model.config["hidden"], model.rnn.states == 2

    def view(name, note, values, low, middle, high):
        return {"name": name, "note": note, "low": low, "middle": middle, "high": high,
                "values": [round(float(v), 3) for v in values[part]]}

    views = [view(name, f"{'tanh(c)' if lstm else 'h'} of cell {cell % hidden} in layer "
                  f"{cell // hidden}, the one of {cells.shape[1]} that follows this most closely "
                  "in the first half of the text. Correlation in the second half, shown here: "
                  f"{r:+.2f}", cells[:, cell], -1, 0, 1) for name, cell, r in chosen]
    missing = [f"Too rare in this text to tell: {', '.join(rare)}."] if rare else []
    if gate is None:
        missing.append("This network has no gate to show.")
    else:
        views.append(view(f"openness of the {'forget' if lstm else 'update'} gate",
                          f"mean of {'f' if lstm else 'z'} over all cells: the part of the state "
                          "that is kept at this character. On average " + mean_by_kind(gate, text),
                          gate, *(float(v) for v in (gate.min(), gate.mean(), gate.max()))))
    views.append(view("surprise", "nats that this character cost", surprise, 0, 0, 6))
    data = json.dumps({"text": text[part], "views": views}).replace("<", "\\u003c")
    page = PAGE
    for name, value in (("ABOUT", html.escape(about)), ("MISSING", " ".join(missing)),
                        ("CURVES", curves(history)), ("DATA", data)):
        page = page.replace(f"<!--{name}-->", value)
    return page


def main(argv=None):
    parser = argparse.ArgumentParser(description="A page that shows what a model's cells do.")
    parser.add_argument("checkpoint", help="of train_shakespeare.py, such as out/best.pt")
    parser.add_argument("page", help="the HTML file to write")
    parser.add_argument("--data", metavar="FILE", help="the text; default: Shakespeare")
    args = parser.parse_args(argv)
    model, vocab, training = rnn.load(args.checkpoint)
    longest = max(vocab.symbols, key=len)
    if len(longest) > 1:
        raise ValueError(f"expected a model of characters, but {args.checkpoint} has the symbol "
                         f"{longest!r}")
    if args.data:
        text, name = train_shakespeare.read_text(args.data), args.data
    else:
        text, name = train_shakespeare.shakespeare()
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    known = training.get("config", {}).get("sha256") == digest
    text = text[int(0.9 * len(text)) :][:SCORED]
    if len(text) < 2:
        raise ValueError("expected two characters or more in the last tenth of the text, but "
                         f"{name} has {len(text)} there")
    about = (f"{args.checkpoint}, a character model with {model.rnn}, reads the last tenth of "
             f"{name}, {'which it was not' if known else 'not the text it was'} trained on.")
    history = training.get("run", training).get("history", [])  # in last.pt, in best.pt
    page = make_page(model, history, vocab.encode(text), text, about)
    Path(args.page).write_text(page, encoding="utf-8")
    print(f"page: {args.page}")


PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>What the cells do</title>
<style>
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --faint: #8884;
        --red: 214, 69, 48; --blue: 38, 110, 214 }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161616 } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 46rem; margin: 0 auto; padding: 1rem 1rem 5rem }
button { font: inherit; font-size: .9rem; color: inherit; background: none; margin: .15rem;
         padding: .3rem .7rem; border: 1px solid #888; border-radius: 1rem; cursor: pointer }
button[aria-pressed=true] { background: var(--ink); color: var(--paper) }
#text { font: .95rem/1.7 ui-monospace, monospace; white-space: pre-wrap; word-break: break-word }
#value { position: fixed; bottom: 0; left: 0; right: 0; padding: .6rem 1rem; min-height: 1.5em;
         background: var(--paper); border-top: 1px solid #888; text-align: center }
#scale { height: .6rem; border-radius: .3rem } .ends { display: flex; font-size: .85rem;
         justify-content: space-between }
svg { width: 100%; max-width: 36rem }
svg text { font-size: 12px; fill: var(--ink); text-anchor: middle }
svg text.left { text-anchor: end } .grid { stroke: var(--faint) } polyline { fill: none;
  stroke-width: 2 }
.training polyline { stroke: rgb(var(--blue)) } .training circle { fill: rgb(var(--blue)) }
.held-out polyline { stroke: rgb(var(--red)) } .held-out circle { fill: rgb(var(--red)) }
</style></head><body>
<h1>What the cells do</h1><p><!--ABOUT--></p>
<p id="buttons"></p><p id="note"></p>
<div id="scale"></div><div class="ends"><span id="low"></span><span id="high"></span></div>
<p id="text"></p><p><!--MISSING--></p>
<h2>Training</h2><p>Loss in nats per character against steps:
<b style="color: rgb(var(--blue))">training</b>,
<b style="color: rgb(var(--red))">held-out</b>.</p><!--CURVES-->
<div id="value">Point at a character, or tap it.</div>
<script type="application/json" id="data"><!--DATA--></script>
<script>
const at = id => document.getElementById(id);
const { text, views } = JSON.parse(at("data").textContent);
const symbols = [...text];
const spans = symbols.map((symbol, k) => {
  const span = document.createElement("span");
  span.textContent = symbol;
  span.dataset.k = k;
  return at("text").appendChild(span);
});
let view;
function colour(v) {  // below the middle blue, above it red; the strength is the distance
  const { low, middle, high } = view;
  const x = (v - middle) / (Math.max(middle - low, high - middle) || 1);
  return `rgba(var(--${x < 0 ? "blue" : "red"}), ${(0.6 * Math.min(1, Math.abs(x))).toFixed(3)})`;
}
function show(chosen) {
  view = chosen;
  spans.forEach((span, k) => { span.style.background = colour(view.values[k]); });
  [...at("buttons").children].forEach((b, k) => b.setAttribute("aria-pressed", views[k] === view));
  const steps = Array.from({ length: 41 }, (_, k) => view.low + (view.high - view.low) * k / 40);
  at("scale").style.background = `linear-gradient(to right, ${steps.map(colour)})`;
  at("note").textContent = view.note;
  at("low").textContent = view.low.toFixed(2);
  at("high").textContent = view.high.toFixed(2);
}
for (const v of views) {
  const button = at("buttons").appendChild(document.createElement("button"));
  button.textContent = v.name;
  button.onclick = () => show(v);
}
at("text").onpointerover = at("text").onclick = event => {
  const k = event.target.dataset.k;
  if (k) at("value").textContent = `${JSON.stringify(symbols[k])}  ` +
    views.map(v => `${v === view ? "\u25b6 " : ""}${v.name} ${v.values[k].toFixed(2)}`)
      .filter((line, n) => views[n] === view || n >= views.length - 2).join("  \u00b7  ");
};
show(views[0]);
</script></body></html>
"""

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
