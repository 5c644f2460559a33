"The site builder notices broken pages, shows notebooks as pages, and README.md is what its notebook says."
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'nbs'/'_docs'))
pytest.importorskip('nbformat')
import build
import pages
import readme
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


@pytest.fixture
def site(tmp_path):
    "A site of two pages and an image in which every link leads somewhere."
    (tmp_path/'deep').mkdir(); (tmp_path/'dot.svg').write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (tmp_path/'deep'/'index.html').write_text('<h1 id="top">Deep</h1><a href="../index.html#caf%C3%A9">home</a><a href="#top">up</a>')
    (tmp_path/'index.html').write_text('''<h1 id="café">Home</h1> <img src="dot.svg"> <a href="deep/index.html#top">deep</a> <a href="deep/">deep</a>
        <a href="https://example.org/paper">paper</a> <a href="mailto:a@example.org">mail</a> <a name="old">a</a><a href="#old">b</a>
        <pre>#| export
:::{note} is how a note is written</pre> <script>let x = "```{toctree}"</script> <code>#| hide</code>''')
    return tmp_path


def test_a_clean_site_passes(site):
    assert build.check_links(site) == []


@pytest.mark.parametrize('html, message', [
    ('<a href="gone.html">x</a>', 'index.html: no such page gone.html'),
    ('<img src="deep/gone.png">', 'index.html: no such page deep/gone.png'),
    ('<a href="deep/index.html#bottom">x</a>', 'index.html: no such anchor deep/index.html#bottom'),
    ('<a href="#nowhere">x</a>', 'index.html: no such anchor #nowhere'),
    ('<script src="https://cdn.example.org/a.js"></script>', 'index.html: script loads https://cdn.example.org/a.js from the network'),
    ('<link href="//cdn.example.org/a.css">', 'index.html: link loads //cdn.example.org/a.css from the network'),
    ('<img src="http://example.org/a.png">', 'index.html: img loads http://example.org/a.png from the network'),
    ('<p>:::{note}</p>', "index.html: raw directive ':::{note'"),
    ('<p>```{toctree}</p>', "index.html: raw directive '```{toctree'"),
    ('<p>#| export</p>', "index.html: raw directive '#| export'")])
def test_what_is_broken_is_named(site, html, message):
    with open(site/'index.html', 'a') as file: file.write(html)
    assert build.check_links(site) == [message]


def test_readings_stand_beside_their_figures(tmp_path, monkeypatch):
    "Below the picture and before the next one, with headings below that of the figure."
    monkeypatch.setattr(build, 'ROOT', tmp_path)
    profile = tmp_path/'paper_figures'/'demo'; folder = profile/'av_expert'; folder.mkdir(parents=True)
    for name in ('fig_a', 'fig_b'): (folder/f'{name}.png').write_bytes(b'')
    (folder/'fig_a_reading.md').write_text('# What follows?\n\nThe first # does.\n\n## Why\n\nIt is so.\n'); (folder/'table.md').write_text('no reading')
    page = build.results(profile)['results_demo']
    of_a, of_b = page.split('### fig_a\n')[1].split('### fig_b\n')
    assert of_a.strip().endswith('#### What follows?\n\nThe first # does.\n\n##### Why\n\nIt is so.') and of_a.index('fig_a.png') < of_a.index('What follows')
    assert of_b.strip().endswith('fig_b.png)') and 'no reading' not in page


def notebook():
    "A notebook about an exported function that the library has."
    source = '#| export\ndef frame_at(time): ...\n\ndef _hidden(): ...'
    return new_notebook(cells=[
        new_code_cell('#| default_exp core'), new_markdown_cell('`frame_at` and `rng`, and `unknown`; ```x = `rng` ```'),
        new_code_cell(source, outputs=[new_output('stream', text='left over')]), new_code_cell('#| hide\nimport secret'),
        new_code_cell('#| echo: false\nprint(1)', outputs=[new_output('stream', text='1')]), new_code_cell('#| exporti\nX = 1'),
        new_code_cell('frame_at(.5)')])


def test_a_notebook_becomes_a_page_with_cards():
    page = pages.page(notebook(), {'frame_at': 'core', 'rng': 'core'})
    text = '\n'.join(c.source for c in page.cells)
    assert 'secret' not in text and 'default_exp' not in text and '#|' not in text
    about, card, source, shown, internal, example = page.cells
    assert about.source.startswith('[`frame_at`](#api-core.frame_at) and [`rng`](#api-core.rng), and `unknown`; ```x = `rng` ```')
    assert card.cell_type == 'markdown' and card.source.startswith('(api-core.frame_at)=\n\n#### frame_at\n\n```python\nframe_at(')
    assert '_hidden' not in card.source and '_hidden' in source.source
    assert source.metadata['tags'] == internal.metadata['tags'] == ['hide-input'] and source.outputs == []
    assert shown.metadata['tags'] == ['remove-input'] and shown.outputs[0].text == '1'
    assert example.source == 'frame_at(.5)' and not example.metadata['tags']
    assert len({c['id'] for c in page.cells}) == len(page.cells)


def test_a_card_has_signature_sentence_and_arguments():
    from talkingface.data.faces import paste_faces
    card = pages.card('data.faces', 'paste_faces')
    assert (paste_faces.__doc__.splitlines()[0]) in card and '| argument | type | default | |' in card
    rows = [line for line in card.splitlines() if line.startswith('| `')]
    assert [row.split('|')[1].strip() for row in rows][:3] == ['`frames`', '`faces`', '`boxes`'] and '| **returns** |' in card
    assert all(line.count('|') - line.count('\\|') == 5 for line in card.splitlines() if line.startswith('| '))
    tracker = pages.card('data.faces', 'StoredTracks')
    assert tracker.startswith('(class-data.faces.StoredTracks)=') and 'class StoredTracks(' in tracker and '- `track(' in tracker
    assert 'pathlib' not in tracker and 'talkingface.' not in tracker
    record = pages.card('data.corpora', 'Record')
    assert "text: str = ''" in record and '-> None' not in record and '| `clip` |' in record


def test_an_executed_notebook_shows_its_own_parameters_and_the_end_of_bars():
    first, bars = 'start\ntrain:   0%|    | 0/9 [00:00<?, ?step/s]\n', 'train:   0%|    | 0/9 [00:00<?]\ntrain:  50%|##  | 4/9 [00:01<00:01]\rtrain: 100%|####| 9/9 [00:02<00:00]\ndone\n'
    nb = new_notebook(cells=[new_code_cell('seed = 0', metadata={'tags': ['parameters']}),
                             new_code_cell('seed = 1', metadata={'tags': ['injected-parameters']}),
                             new_code_cell('run()', outputs=[new_output('stream', name='stderr', text=t) for t in (first, bars)])])
    page = pages.page(nb, {})
    assert [c.source for c in page.cells] == ['seed = 1', 'run()']
    assert [o.text for o in page.cells[1].outputs] == ['start\ntrain: 100%|####| 9/9 [00:02<00:00]\ndone']
    alone = pages.page(new_notebook(cells=[new_code_cell('seed = 0', metadata={'tags': ['parameters']})]), {})
    assert [c.source for c in alone.cells] == ['seed = 0']


def test_every_exported_name_has_one_place():
    names = build.symbols()
    assert names['paste_faces'] == 'data.faces' and names['corpus_hash'] == 'data.corpora' and len(names) > 100


def test_readme_is_what_its_notebook_says():
    path = ROOT/'README.md'
    if not path.is_file(): pytest.skip('README.md is not there yet: `make export` writes it from nbs/index.ipynb')
    assert path.read_text() == readme.render(), 'README.md differs from nbs/index.ipynb: run `make export`'
