"""The HTML of our pages: one file each, without scripts, readable at any width."""

import html

from support.text import harmless


STYLE = """body{font:15px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:1120px;
margin:2rem auto;padding:0 1.2rem;overflow-wrap:anywhere}h1{font-size:1.7rem;margin:0}
h2{font-size:1.2rem;margin:2.2rem 0 .6rem;border-bottom:1px solid #d8dee4;padding-bottom:.25rem}
h3{font-size:1rem;margin:1.2rem 0 .3rem}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(330px,100%),1fr));gap:.8rem}
figure{margin:0}svg{width:100%;height:auto}table{border-collapse:collapse;font-variant-numeric:
tabular-nums;font-size:.86rem;margin:.5rem 0}td,th{padding:.16rem .5rem;text-align:right;
border-bottom:1px solid #eaeef2}th{font-weight:600;background:#f6f8fa}td:first-child,
th:first-child{text-align:left;white-space:nowrap}pre{background:#f6f8fa;border-radius:6px;
padding:.7rem .9rem;font-size:.82rem;line-height:1.4;white-space:pre-wrap;overflow-wrap:anywhere;
margin:.3rem 0 1rem}.note{color:#57606a}.scroll{overflow-x:auto;white-space:pre}
.shares{display:grid;grid-template-columns:max-content 1fr;gap:.15rem .8rem;align-items:center;
font-size:.86rem;font-variant-numeric:tabular-nums}.shares i{display:block;height:.8rem;
background:#4c78a8}.columns{display:flex;gap:.8rem;overflow-x:auto}
.columns>div{flex:1 0 min(20rem,85%)}.columns pre{max-height:18rem;overflow:auto}
.runs td,.runs th{text-align:left;vertical-align:top;min-width:7rem;max-width:24rem;
white-space:normal;overflow-wrap:anywhere}.runs td:first-child{min-width:6rem;max-width:14rem;
white-space:normal}.runs span{display:inline-block;
word-break:break-all}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(15rem,46%),1fr));
gap:.15rem 1rem;margin:.7rem 0;font-size:.86rem;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1.2rem;font-size:.86rem;margin:.3rem 0}
.legend i{display:inline-block;width:1.4rem;height:.25rem;margin-right:.4rem;vertical-align:middle}
summary{cursor:pointer;font-size:.9rem}.stage{font-size:.82rem;text-align:center;line-height:1.5}
.stage i{display:block;height:.7rem;margin:0 auto;background:#4c78a8}
@media(max-width:600px){body{margin:1rem auto;padding:0 .7rem}
.shares{grid-template-columns:1fr}}"""

# No browser runs a script of our pages or loads anything for them, whatever a document holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title, parts, style=""):
    """A complete page; `parts` are HTML, `title` is text."""
    head = (f"<!doctype html><html lang=en><meta charset=utf-8>"
            f'<meta http-equiv=Content-Security-Policy content="{POLICY}">'
            "<meta name=viewport content='width=device-width'>"
            f"<title>{escaped(title)}</title><style>{STYLE}{style}</style>"
            f"<h1>{escaped(title)}</h1>")
    return "\n".join([head, *parts]) + "\n"


def section(heading, *contents, note=""):
    """A part of a page under its heading, a text; [] if it has no content."""
    content = "".join(contents)
    if not content:
        return []
    note = f"<p class=note>{note}</p>" if note else ""
    return [f"<h2>{escaped(heading)}</h2>", note + content]


def folded(heading, content):
    """HTML that a reader unfolds; `heading` is a text."""
    return f"<details><summary>{escaped(heading)}</summary>{content}</details>"


def escaped(text):
    """Text of a user as HTML that shows it: it is never markup, and control characters are seen."""
    return html.escape(harmless(str(text)))


def table(head, rows, kind=""):
    """An HTML table of strings, escaped; `kind` is its class."""
    lines = [table_line(head, "th")]
    for row in rows:
        lines.append(table_line(row, "td"))
    return f"<div class=scroll><table class='{kind}'>{''.join(lines)}</table></div>"


def table_line(cells, tag):
    return "<tr>" + "".join(f"<{tag}>{escaped(cell)}" for cell in cells)


def shares(counts, unit):
    """A bar for each entry of {name: count}, as long as its share of the sum."""
    total = max(1, sum(counts.values()))
    lines = []
    for name, count in counts.items():
        share = count / total
        lines.append(f"<span>{escaped(name)}: {count:,} {unit}, {share:.1%}</span>"
                     f"<i style='width:{100 * share:.2f}%' aria-hidden=true></i>")
    return f"<div class=shares>{''.join(lines)}</div>"
