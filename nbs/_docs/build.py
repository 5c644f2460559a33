"""`make docs`: library notebooks (run now) and executed stage notebooks become a Sphinx site in _docs/; links are checked."""
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

sys.path.insert(0, str(Path(__file__).parent))
import nbformat
from pages import directives, execute, module_of, page, public_definitions, without_directives

ROOT = Path(__file__).resolve().parents[2]
NBS, SOURCE, SITE = ROOT/'nbs', ROOT/'_docs_src', ROOT/'_docs'
PROFILES = ('demo', 'medium', 'bench', 'paper', 'smoke')
PAPERS = {'stabilized_sync': 'Paper A, stabilized synchronization loss', 'av_expert': 'Paper B, AV-HuBERT as expert', 'g4g': 'Paper C, G4G'}


def notebooks(folder: Path, pattern: str = '*.ipynb') -> list[Path]:
    return sorted(p for p in folder.rglob(pattern) if not any(x.startswith(('.', '_')) for x in p.relative_to(NBS).parts))


def library() -> list[Path]:
    return [p for p in notebooks(NBS, '[0-9]*.ipynb') if not {'papers', 'guides'} & set(p.parts)]


def symbols() -> dict[str, str]:
    "Exported name -> module, for names that exactly one module exports."
    found: dict[str, list] = {}
    for path in library():
        nb = nbformat.read(path, 4)
        for cell in nb.cells:
            if 'export' in directives(cell):
                for name in public_definitions(without_directives(cell.source)): found.setdefault(name, []).append(module_of(nb))
    return {name: where[0] for name, where in found.items() if len(where) == 1}


def write(nb, path: Path, names: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(page(nb, names), path)


def executed_stages() -> list[tuple[Path, Path | None]]:
    "Every stage notebook with its executed copies; the profile that was run last in the order of PROFILES is shown."
    out = []
    for source in notebooks(NBS/'papers'):
        copies = []
        for profile in PROFILES:
            logs = [p for p in (ROOT/'runs'/profile/'log').glob('*.json') if f'"{source.relative_to(ROOT).as_posix()}"' in p.read_text()]
            copies = sorted(ROOT/'runs'/profile/'notebooks'/f'{p.stem}.ipynb' for p in logs)
            copies = [c for c in copies if c.is_file()]
            if copies: break
        out += [(source, c) for c in copies] or [(source, None)]
    return out


def from_site(text: str) -> str:
    "Links that the index writes for the checkout, as links within the site."
    text = re.sub(r'\[claims\.md\]\(\.\./paper_figures/(\w+)/claims\.md\)', r'[claims](claims_\1.md)', text)
    text = re.sub(r'\[([^\]]*)\]\(\.\./paper_figures/[^)]*\.md\)', r'`\1`', text)      # a table has its own page: that of its stage
    text = re.sub(r'(\]\(|src=")\.\./(paper_figures/)', r'\1_static/\2', text)
    text = re.sub(r'\]\(\.\./(LICENSE|CHANGELOG\.md)\)', lambda m: '](licences.md)' if m[1] == 'LICENSE' else '](changelog.md)', text)
    return re.sub(r'\]\(\.\./[^)]*\)', '](index.ipynb)', text)


def reading(figure: Path) -> str:
    "What FIGURE_reading.md says, its headings below that of the figure; nothing where there is none."
    path = figure.with_name(f'{figure.stem}_reading.md')
    return re.sub(r'^(#+ )', r'###\1', path.read_text().strip(), flags=re.M) + '\n\n' if path.is_file() else ''


def results(profile: Path) -> dict[str, str]:
    "Pages of the tracked results of a profile: the ledger of claims, and every table and figure as a picture, with its reading where one is written."
    pages = {}
    if (profile/'claims.md').is_file(): pages[f'claims_{profile.name}'] = f'# Claims of the papers, profile {profile.name}\n\n' + (profile/'claims.md').read_text()
    folders = {}
    of, order = lambda p: p.parent.relative_to(profile).as_posix(), [*PAPERS]       # papers in their order, then what is of none
    for p in sorted(profile.rglob('*.png'), key=lambda p: (order.index(of(p)) if of(p) in order else len(order), p.as_posix())):
        folders.setdefault(of(p), []).append(p)
    if not folders: return pages
    link = lambda p: f'_static/paper_figures/{p.relative_to(ROOT/"paper_figures").as_posix()}'
    parts = [text for folder, paths in folders.items() for text in
             (f'## {PAPERS.get(folder, "Corpus, experts and metrics")}\n', *(f'### {p.stem}\n\n[![{p.stem}]({link(p)})]({link(p)})\n\n{reading(p)}' for p in paths))]
    pages[f'results_{profile.name}'] = f'# Tables and figures, profile {profile.name}\n\nEach comes as `.png`, `.pdf` and the `.csv` that it is drawn from; a click shows it whole.\n\n' + '\n'.join(parts)
    return pages


def toctree(caption: str, entries: list[str]) -> str:
    return f'```{{toctree}}\n:caption: {caption}\n:maxdepth: 1\n\n' + '\n'.join(entries) + '\n```\n'


def prepare() -> None:
    "Write the Sphinx source folder."
    shutil.rmtree(SOURCE, ignore_errors=True); SOURCE.mkdir(); names = symbols()
    shutil.copy(Path(__file__).parent/'conf.py', SOURCE)
    shutil.copytree(Path(__file__).parent/'static', SOURCE/'_static')
    import jupyter_server_mathjax
    shutil.copytree(Path(jupyter_server_mathjax.__file__).parent/'static', SOURCE/'_static'/'mathjax', ignore=shutil.ignore_patterns('*.map', 'unpacked', 'docs', 'test'))
    if (ROOT/'paper_figures').is_dir(): shutil.copytree(ROOT/'paper_figures', SOURCE/'_static'/'paper_figures')
    pages = [*library(), *notebooks(NBS/'guides')]
    with ThreadPoolExecutor(max(1, min(4, os.cpu_count() or 1))) as pool:
        for path, nb in zip(pages, pool.map(lambda p: execute(p, ROOT), pages)): write(nb, SOURCE/path.relative_to(NBS), names)
    stages = []
    for source, copy in executed_stages():
        nb = nbformat.read(copy or source, 4); target = SOURCE/source.relative_to(NBS).parent/f"{copy.stem.replace('@', '-') if copy else source.stem}.ipynb"
        head = next(c for c in nb.cells if c.cell_type == 'markdown')
        if copy: head.source = head.source.replace('\n', f' ({copy.stem.split("@")[1]})\n', 1) if '\n' in head.source else f'{head.source} ({copy.stem.split("@")[1]})'
        else: head.source += '\n\n:::{note}\nThis stage has not been run in this checkout, so its page has no outputs. `make repro` runs it.\n:::'
        write(nb, target, names); stages.append(target.relative_to(SOURCE).with_suffix('').as_posix())
    told = {name: text for profile in sorted((ROOT/'paper_figures').glob('*/')) if profile.name in PROFILES for name, text in results(profile).items()}
    for name, text in told.items(): (SOURCE/f'{name}.md').write_text(text)
    index = execute(NBS/'index.ipynb', ROOT)
    relative = lambda p: p.relative_to(NBS).with_suffix('').as_posix()
    tocs = toctree('Guides', [relative(p) for p in notebooks(NBS/'guides')]) + '\n' + toctree('Library', [relative(p) for p in library()]) + \
        '\n' + toctree('Results', list(told)) + '\n' + toctree('Pipeline and papers', stages) + '\n' + toctree('About', ['changelog', 'licences'])
    index.cells.append(nbformat.v4.new_markdown_cell(tocs))
    for cell in index.cells:
        if cell.cell_type == 'markdown': cell.source = from_site(cell.source)
        for output in cell.get('outputs', []):
            if 'text/markdown' in output.get('data', {}):       # links of outputs are not resolved to pages
                output.data['text/markdown'] = re.sub(r'\]\((claims_\w+)\.md\)', r'](\1.html)', from_site(output.data['text/markdown']))
    write(index, SOURCE/'index.ipynb', names)
    shutil.copy(ROOT/'CHANGELOG.md', SOURCE/'changelog.md'); shutil.copy(Path(__file__).parent/'licences.md', SOURCE/'licences.md')


class _Links(HTMLParser):
    "Collects the links and anchors of a page."
    def __init__(self):
        super().__init__(); self.links, self.anchors = [], set()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors |= {attributes[k] for k in ('id', 'name') if attributes.get(k)}
        for key in ('href', 'src'):
            if attributes.get(key): self.links.append((tag, attributes[key]))


def check_links(site: Path) -> list[str]:
    "Every local link that leads nowhere, every asset fetched from a network, and directives that were left as text."
    pages = {}
    for file in site.rglob('*.html'):
        if '_static' in file.parts: continue
        parser = _Links(); parser.feed(file.read_text()); pages[file.resolve()] = parser
    wrong = []
    for file, parser in pages.items():
        where = file.relative_to(site.resolve())
        for tag, link in parser.links:
            parts = urlsplit(link)
            if parts.scheme in ('http', 'https') or link.startswith('//'):
                if tag in ('script', 'link', 'img') and 'canonical' not in link: wrong.append(f'{where}: {tag} loads {link} from the network')
                continue
            if parts.scheme: continue
            target = (file.parent/unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir(): target = target/'index.html'
            if not target.exists(): wrong.append(f'{where}: no such page {link}')
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors: wrong.append(f'{where}: no such anchor {link}')
        text = re.sub(r'<(script|style|pre|code).*?</\1>', '', file.read_text(), flags=re.S)
        for raw in re.findall(r':::\{\w+|```\{\w+|#\|\s*(?:export|hide|echo)', text): wrong.append(f'{where}: raw directive {raw!r}')
    return wrong


def main() -> int:
    prepare()
    built = subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-b', 'html', '-d', str(SOURCE/'_trees'), str(SOURCE), str(SOURCE/'_site')])
    if built.returncode: return built.returncode
    shutil.rmtree(SITE, ignore_errors=True); shutil.move(SOURCE/'_site', SITE)
    wrong = check_links(SITE)
    for line in wrong: print(line, file=sys.stderr)
    count = len(list(SITE.rglob('*.html')))
    print(f'{count} pages in {SITE.relative_to(ROOT)}/, {len(wrong)} broken links')
    return 1 if wrong else 0


if __name__ == '__main__':
    sys.exit(main())
