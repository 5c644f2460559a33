"""The shape of the repository: what the conventions promise, checked on the files themselves."""
import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = sorted(p for p in (ROOT/'nbs').rglob('[0-9]*.ipynb') if not {'papers', 'guides'} & set(p.parts) and '.ipynb_checkpoints' not in p.parts)
STAGES = sorted(p for p in (ROOT/'nbs'/'papers').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
name = lambda p: p.relative_to(ROOT/'nbs').as_posix()


def cells(path, kind='code'):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == kind]


def module_of(path) -> str | None:
    "`data.video` for the notebook that exports it."
    for cell in cells(path):
        if found := re.search(r'^#\|\s*default_exp\s+(\S+)', cell.source, re.M): return found[1]


MODULES = {module_of(p): i for i, p in enumerate(LIBRARY)}


def imports_of(source: str) -> set[str]:
    "Modules of ours that Python `source` imports, anywhere in it, absolute names without the package."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f'{node.module}.{a.name}' for a in node.names}
    ours = {n.removeprefix('talkingface.') for n in found if n.startswith('talkingface')}
    return ours & set(MODULES)


def python(path) -> str:
    "The code of a notebook without magics."
    return '\n'.join('\n'.join(l for l in c.source.splitlines() if not l.lstrip().startswith(('%', '!'))) for c in cells(path))


def exported(path) -> str:
    return '\n'.join(c.source for c in cells(path) if re.match(r'#\|\s*export', c.source))


def named_in(source: str) -> set[str]:
    "Modules of ours that registries name as text, `talkingface.generators.light:LightGenerator`."
    return {m for m in re.findall(r"'talkingface\.([\w.]+):\w+'", source)} & set(MODULES)


CLOSURE = {}


def closure(modules) -> set[str]:
    "`modules` and everything of ours that they import, directly or not."
    seen, todo = set(), set(modules)
    while todo:
        m = todo.pop(); seen.add(m)
        if m not in CLOSURE: CLOSURE[m] = imports_of(exported(LIBRARY[MODULES[m]])) | named_in(exported(LIBRARY[MODULES[m]]))
        todo |= CLOSURE[m] - seen
    return seen


@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_library_notebook_names_its_module(path):
    "One notebook, one module, the same words in both: 01_data/00_video -> data.video."
    expected = '.'.join(re.sub(r'^\d+_', '', part) for part in path.relative_to(ROOT/'nbs').with_suffix('').parts)
    assert module_of(path) == expected


@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_imports_point_only_backwards(path):
    "A notebook imports only modules whose notebooks stand before it."
    forward = {m for m in imports_of(python(path)) if MODULES[m] > MODULES[module_of(path)]}
    assert not forward, f'{name(path)} imports {forward}, which come later'


@pytest.mark.parametrize('path', LIBRARY, ids=name)
def test_exported_functions_have_docstrings(path):
    bare = [n.name for n in ast.parse(exported(path)).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))
            and not n.name.startswith('_') and not ast.get_docstring(n)]
    assert not bare


def dvc():
    return yaml.safe_load((ROOT/'dvc.yaml').read_text())['stages']


def stages_of(path) -> list[dict]:
    "The stages that run a notebook; several may, with other parameters."
    relative = path.relative_to(ROOT).as_posix()
    found = [s for s in dvc().values() if relative in s['cmd']]
    assert found, f'{relative} is run by no stage of dvc.yaml'
    return found


@pytest.mark.parametrize('path', STAGES, ids=name)
def test_stage_notebook_has_parameters(path):
    "Papermill needs a code cell tagged `parameters`; nbdev_clean has been known to delete the tag."
    tagged = [c for c in cells(path) if 'parameters' in c.metadata.get('tags', [])]
    assert len(tagged) == 1
    assert nbformat.read(path, 4).cells[0].source.strip('- \n') == 'skip_exec: true', 'first cell must be the raw cell skip_exec'


@pytest.mark.parametrize('path', STAGES, ids=name)
def test_stage_notebook_defines_no_functions(path):
    defined = [n for n in ast.walk(ast.parse(python(path))) if isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))]
    assert not defined, 'stage notebooks are thin: move it into a library notebook'


@pytest.mark.parametrize('path', STAGES, ids=name)
def test_stage_parameters_exist(path):
    "Every parameter that dvc.yaml sets is declared in the parameters cell."
    cell, = [c for c in cells(path) if 'parameters' in c.metadata.get('tags', [])]
    declared = {t.id for n in ast.parse(cell.source).body if isinstance(n, ast.Assign) for t in n.targets}
    given = {p for stage in stages_of(path) for p in re.findall(r'(?:^|\s)(\w+)=', stage['cmd'].split('--set', 1)[1])}
    assert given <= declared, f'{name(path)} has no parameter {given - declared}'


@pytest.mark.parametrize('path', STAGES, ids=name)
def test_stage_deps_cover_its_imports(path):
    "A change of any module that a stage runs must rerun the stage."
    needed = [f"talkingface/{m.replace('.', '/')}.py" for m in closure(imports_of(python(path)))]
    for stage in stages_of(path):
        deps = [str(d) for d in stage['deps']]
        assert path.relative_to(ROOT).as_posix() in deps
        lacking = [f for f in needed if not any(f == d or f.startswith(d.rstrip('/') + '/') for d in deps)]
        assert not lacking, f'add to the deps of {name(path)}: {sorted(lacking)}'


def test_every_stage_is_described():
    assert not [n for n, s in dvc().items() if len(s.get('desc', '')) < 20]


def test_every_table_and_figure_has_a_stage():
    for path in STAGES: stages_of(path)


def test_notebooks_begin_with_their_title():
    "No leftovers of a conversion stand before it."
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        first = json.loads(path.read_text())['cells'][0]
        assert first['cell_type'] != 'code' or not ''.join(first['source']).startswith('# ---'), path


def test_notebooks_are_committed_without_outputs():
    dirty = [name(p) for p in LIBRARY + STAGES if any(c.get('outputs') or c.get('execution_count') for c in cells(p))]
    assert not dirty


def test_modules_are_what_the_notebooks_export(tmp_path):
    "talkingface/ is generated: exporting again changes nothing."
    from nbdev.export import nb_export
    for path in LIBRARY:
        nb_export(path, lib_path=tmp_path/'talkingface')
    for path in (tmp_path/'talkingface').rglob('*.py'):
        ours = ROOT/'talkingface'/path.relative_to(tmp_path/'talkingface')
        strip = lambda text: re.sub(r'(File to edit: ).*|(# %% ).*(nbs/)', r'\1\3', text)
        assert strip(path.read_text()) == strip(ours.read_text()), f'{ours} differs from its notebook: run make export'


def test_settings_and_pyproject_agree():
    import configparser, tomllib
    settings = configparser.ConfigParser(); settings.read(ROOT/'settings.ini')
    project = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']
    import talkingface
    assert settings['DEFAULT']['version'] == talkingface.__version__
    assert project['name'] == settings['DEFAULT']['lib_name'] and project['description'] == settings['DEFAULT']['description']
    assert 'tags' in settings['DEFAULT']['allowed_cell_metadata_keys'], 'nbdev_clean would delete the parameters tags'
