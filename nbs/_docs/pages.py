"""Turn notebooks into pages: execute them, and show each exported function as signature, sentence, arguments and folded source."""
import ast
import importlib
import inspect
import os
import re
import textwrap
from dataclasses import is_dataclass
from pathlib import Path

import nbformat
from fastcore.docments import docments
from nbformat.v4 import new_markdown_cell

DIRECTIVE = re.compile(r'^#\|\s*(.*)$', re.M)
SHORTER = ((r'\btorch\.nn\.modules\.\w+\.', 'nn.'), (r'\b(?:typing|talkingface(?:\.\w+)*|pathlib(?:\._local)?|collections\.abc)\.', ''),
           (r'\bnumpy\.', 'np.'), (r'\btorch\.Tensor\b', 'Tensor'))
LINK = re.compile(r'`([A-Za-z_][\w.]*)`')


def execute(path: Path, root: Path, seconds: int = 300) -> nbformat.NotebookNode:
    "The notebook with the outputs of a fresh run. A failing cell is an error: a page never shows stale or broken output."
    from nbclient import NotebookClient
    nb = nbformat.read(path, 4)
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    return NotebookClient(nb, timeout=seconds, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()


def directives(cell) -> set[str]:
    return {d.strip() for d in DIRECTIVE.findall(cell.source)} if cell.cell_type == 'code' else set()


def without_directives(source: str) -> str:
    return '\n'.join(l for l in source.splitlines() if not l.startswith('#|')).strip('\n')


def module_of(nb) -> str | None:
    for cell in nb.cells:
        for d in directives(cell):
            if d.startswith('default_exp'): return d.split()[1]


def readable(annotation) -> str:
    if annotation in (inspect.Parameter.empty, None): return ''
    text = annotation if isinstance(annotation, str) else getattr(annotation, '__name__', None) if isinstance(annotation, type) else str(annotation)
    return (text or str(annotation)).replace('typing.', '').replace('pathlib.', '').replace('numpy.', 'np.').replace('|', '\\|')


def arguments(obj) -> str:
    "A table of the arguments of `obj` from its signature and trailing comments, or nothing where nothing is commented."
    try: docs = docments(obj, full=True, returns=True)
    except (ValueError, TypeError, OSError, SyntaxError): return ''
    rows = []
    for key, value in docs.items():
        if key in ('self', 'cls') or (key == 'return' and not value.docment): continue
        default = '' if key == 'return' or value.default is inspect.Parameter.empty or value.default is None else f'`{value.default!r}`'
        words = ' '.join((value.docment or '').split()).replace('|', '\\|')
        rows.append(f"| {'**returns**' if key == 'return' else f'`{key}`'} | {readable(value.anno)} | {default} | {words} |")
    commented = any((v.docment or '').strip() for k, v in docs.items() if k not in ('self', 'cls'))
    return '| argument | type | default | |\n|---|---|---|---|\n' + '\n'.join(rows) if rows and commented else ''


def signature(name: str, obj) -> str:
    try: text = f'{name}{inspect.signature(obj)}'
    except (ValueError, TypeError): return name
    text = re.sub(r"<class '([\w.]+)'>", r'\1', text)
    text = re.sub(r"(: |-> )'([^']+)'", r'\1\2', text)       # annotations written as text
    if inspect.isclass(obj): text = text.removesuffix(' -> None')
    for pattern, short in SHORTER: text = re.sub(pattern, short, text)
    return '\n    '.join(textwrap.wrap(text, 96, break_long_words=False, break_on_hyphens=False))


def card(module: str, name: str) -> str:
    "Markdown for one exported symbol, with an anchor that other pages can link to."
    obj = getattr(importlib.import_module(f'talkingface.{module}'), name)
    kind = 'class' if inspect.isclass(obj) else 'function'
    parts = [f'({anchor(module, name)})=', f'#### {name}', f'```python\n{"class " if kind == "class" else ""}{signature(name, obj)}\n```',
             inspect.getdoc(obj) or '', arguments(obj.__init__ if kind == 'class' and not is_dataclass(obj) else obj)]
    if kind == 'class':
        for method, value in vars(obj).items():
            if (method.startswith('_') and method != '__call__') or not inspect.isfunction(value) or not value.__doc__: continue
            parts += [f'- `{signature(method, value)}`: {" ".join(inspect.getdoc(value).split())}']
    return '\n\n'.join(p for p in parts if p)


def public_definitions(source: str) -> list[str]:
    patched = lambda n: any(getattr(d, 'id', '') == 'patch' for d in n.decorator_list)
    return [n.name for n in ast.parse(source).body
            if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_') and not patched(n)]


def anchor(module: str, name: str) -> str:
    "Sphinx does not tell capitals apart in targets, so classes have a prefix of their own."
    return f"{'class' if name[:1].isupper() else 'api'}-{module}.{name}"


def linked(text: str, symbols: dict[str, str], here: str | None) -> str:
    "Turn `` `name` `` into a link where the library exports exactly one such name."
    def link(m):
        target = symbols.get(m[1])
        return f'[{m[0]}](#{anchor(target, m[1])})' if target and target != here else m[0]
    fenced = re.split(r'(```.*?```|\[[^\]]*\]\([^)]*\))', text, flags=re.S)
    return ''.join(p if i % 2 else LINK.sub(link, p) for i, p in enumerate(fenced))


BAR = re.compile(r'\d+%\|.*\| *[\d.]+[kMG]?/[\d.]+[kMG]? \[')


def quiet(text: str) -> str:
    "Printed text with the last state of each progress bar only."
    lines = re.split(r'[\r\n]+', text.strip('\r\n')) if BAR.search(text) else text.splitlines()
    follows = [*lines[1:], '']
    return '\n'.join(l for l, after in zip(lines, follows) if not (BAR.search(l) and BAR.search(after)))


def merged(outputs: list) -> list:
    "Outputs with neighbouring pieces of one stream joined and progress bars at their end."
    out = []
    for output in outputs:
        if output.output_type == 'stream' and out and out[-1].output_type == 'stream' and out[-1].name == output.name: out[-1].text += output.text
        else: out.append(output)
    for output in out:
        if output.output_type == 'stream': output.text = quiet(output.text)
    return out


def page(nb, symbols: dict[str, str]) -> nbformat.NotebookNode:
    "The notebook as a page: hidden cells dropped, exported definitions shown as cards over their folded source."
    module, out = module_of(nb), []
    injected = any('injected-parameters' in c.metadata.get('tags', []) for c in nb.cells)
    for cell in nb.cells:
        marks = directives(cell)
        if injected and 'parameters' in cell.metadata.get('tags', []): continue     # the run had others, which follow
        if cell.cell_type == 'raw' or marks & {'hide'} or any(d.startswith('default_exp') for d in marks): continue
        if cell.cell_type == 'markdown': cell.source = linked(cell.source, symbols, None); out.append(cell); continue
        exported = bool(marks & {'export', 'exports', 'exporti'})
        cell.outputs = merged(cell.outputs)
        cell.source = without_directives(cell.source); tags = cell.metadata.setdefault('tags', [])
        if not cell.source.strip(): continue
        if exported:
            names = public_definitions(cell.source)
            out += [new_markdown_cell(linked(card(module, n), symbols, module)) for n in names]
            tags.append('hide-input'); cell.outputs = []
        if any(d.replace(' ', '') == 'echo:false' for d in marks): tags.append('remove-input')
        cell.metadata['tags'] = [t for t in tags if t != 'parameters']
        out.append(cell)
    nb.cells = out
    for i, cell in enumerate(nb.cells): cell['id'] = f'cell-{i:03d}'
    return nb
