"""README.md from nbs/index.ipynb: its cells run, hidden code left out, printed Markdown kept."""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pages import directives, execute, without_directives

ROOT = Path(__file__).resolve().parents[2]


def render() -> str:
    "The text of README.md."
    parts = []
    for cell in execute(ROOT/'nbs'/'index.ipynb', ROOT).cells:
        marks = directives(cell)
        if cell.cell_type == 'raw' or 'hide' in marks: continue
        if cell.cell_type == 'markdown': parts.append(cell.source); continue
        if not any(d.replace(' ', '') == 'echo:false' for d in marks): parts.append(f'```python\n{without_directives(cell.source)}\n```')
        for output in cell.outputs:
            data = output.get('data', {})
            if 'text/markdown' in data: parts.append(data['text/markdown'])
            elif output.output_type == 'stream': parts.append(f"```\n{output.text.rstrip()}\n```")
    text = '\n\n'.join(p.strip() for p in parts if p.strip())
    # links written for nbs/ become links from the root
    text = re.sub(r'(\]\(|src=")\.\./', r'\1', text)
    return '<!-- written from nbs/index.ipynb by `make export`; edit that -->\n\n' + text + '\n'


if __name__ == '__main__':
    (ROOT/'README.md').write_text(render())
