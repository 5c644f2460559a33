"""The whole pipeline at smoke size, in a copy of the checkout: from the tracked corpus to tables and figures, and a second run that does nothing."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from talkingface.core import ParamsError
from talkingface.pipeline import affected, check_parameters, stage_graph

pytestmark = pytest.mark.e2e


def run(folder: Path, *command, check=True):
    "A command of this environment in `folder`; its output is shown if it fails."
    environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}', 'DVC_NO_ANALYTICS': '1'}
    done = subprocess.run([sys.executable, '-m', *map(str, command)], cwd=folder, env=environment, text=True, capture_output=True, timeout=1200)
    assert not check or done.returncode == 0, f'{command} failed:\n{done.stdout[-6000:]}\n{done.stderr[-3000:]}'
    return done


@pytest.fixture(scope='module')
def checkout(root, tmp_path_factory) -> Path:
    "A copy of the tracked files and the data, with the profile smoke selected and built."
    if not (root/'data'/'corpus'/'manifest.csv').is_file(): pytest.fail('no data/corpus: `dvc pull data.dvc` (make test does it)')
    copy = tmp_path_factory.mktemp('pipeline')/'checkout'
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns('.venv', '.git', 'runs', 'cache', 'tmp', '_docs', '_docs_src', 'dvcstore', '__pycache__', '*.egg-info',
                                                               'paper_figures', '.pytest_cache', 'dvc.lock'))
    shutil.copytree(root/'paper_figures'/'studies', copy/'paper_figures'/'studies')          # ratings are an input
    subprocess.run(['git', 'init', '-q', str(copy)], check=True)
    log = run(copy, 'talkingface', 'repro', '--profile', 'smoke')
    (copy/'log.txt').write_text(log.stdout)
    return copy


PAPER_A = tuple(f'stabilized_sync/{f}' for f in ('fig_01', 'fig_01c', 'fig_shift', 'fig_leak', 'fig_leak_rows', 'fig_closed', 'fig_training', 'fig_exploitation',
                                                  'fig_strips', 'fig_strips_ablation', 'table_expert_variance_ratio'))
TABLES_A = tuple(f'stabilized_sync/table_{t}' for t in ('main', 'ablation', 'sync_losses', 'silent_faces', 'post_processing', 'expert_variance'))
PAPER_B = tuple(f'av_expert/{f}' for f in ('fig_02', 'fig_03', 'fig_04', 'fig_04_rows', 'fig_same_expert', 'fig_validity', 'fig_validity_costs'))
TABLES_B = tuple(f'av_expert/{t}' for t in ('table_01', 'table_02', 'table_04'))       # each with its pairs
ALONE_B = ('av_expert/table_study', 'av_expert/fig_validity_table')                    # without
PAPER_C = tuple(f'g4g/{f}' for f in ('fig_01', 'fig_02_hd', 'fig_02_test', 'fig_03', 'fig_alignment', 'fig_deformation'))
TABLES_C = tuple(f'g4g/{t}' for t in ('table_01', 'table_01_more', 'table_02', 'table_02_more'))
ALONE_C = ('g4g/table_01_cost', 'g4g/table_study')
FIGURES = (*PAPER_A, *PAPER_B, *PAPER_C, 'av_expert/fig_01', 'av_expert/fig_05', 'robustness_auc',
           'robustness_cosine', 'robustness_summary', 'experts_offsets', 'experts_visemes', 'experts_losses', 'av_expert/fig_05_metrics',
           'behaviour', 'behaviour_answers')


def test_claims_are_judged_for_every_expert(checkout):
    "At this size nothing is reproduced or not; but each claim has its numbers, and each expert its rows."
    claims = pd.read_csv(checkout/'paper_figures'/'smoke'/'claims_experts.csv')
    assert {'avsyncnet', 'avhubert', 'avhubert_contrast'} <= set(claims['first'])
    assert claims.groupby('claim')['measured'].count().min() > 0        # relative measures of networks that know nothing may have no value
    for name in ('syncnet', 'avsyncnet', 'avhubert', 'avhubert_contrast'):
        rows = pd.read_csv(checkout/'runs'/'smoke'/'robustness'/f'{name}.csv')
        assert set(rows['perturbation']) == {'shift_x', 'rotation', 'jpeg', 'noise', 'offset'} and set(rows['expert']) == {name}


def test_tables_and_figures_are_there_with_their_numbers(checkout):
    made = {p.relative_to(checkout/'paper_figures'/'smoke').as_posix() for p in (checkout/'paper_figures'/'smoke').rglob('*') if p.is_file()}
    expected = {f'{t}.{s}' for t in ('baselines', 'baselines_more', 'experts', *TABLES_A, *TABLES_B, *ALONE_B, *TABLES_C, *ALONE_C) for s in ('csv', 'md', 'tex', 'pdf', 'png')} | {f'{f}.{s}' for f in FIGURES for s in ('csv', 'pdf', 'png')}
    tables = {f'{t}_pairs.csv' for t in (*TABLES_A, *TABLES_B, *TABLES_C)} | {'av_expert/fig_validity_reading.md', 'av_expert/fig_validity_differences.csv', 'claims.csv', 'claims.md', 'claims_experts.csv', 'claims_experts.md', 'claims_experts_aims.csv', 'av_expert/fig_01_stats.csv', 'baselines_order.csv'}
    assert expected | tables | {'provenance.json'} <= made
    table = pd.read_csv(checkout/'paper_figures'/'smoke'/'baselines.csv')
    floors = {'ground_truth', 'reencoded', 'reencoded_35', 'reencoded_45', 'random_frame', 'static_frame', 'shuffled_audio'}
    assert floors | {'setup_a', 'final'} <= set(table['method'])
    assert set(table['set']) == {'test', 'words', 'hd'}


def test_tables_of_paper_c_have_their_lines_on_both_sets(checkout):
    "What was run has numbers, with its neighbours; what was not has the reported ones or a reason."
    made = checkout/'paper_figures'/'smoke'/'g4g'; read = lambda name: pd.read_csv(made/f'{name}.csv')
    first, second = (read(name).set_index(['set', 'method']) for name in ('table_01', 'table_02'))
    for name in ('hd', 'test'):
        lines = first.loc[name]; assert {'ground_truth', 'wav2lip', 'wav2lip_published', 'dinet', 'final', 'g4g', 'videoretalking', 'iplap'} <= set(lines.index)
        assert np.isfinite(lines.loc[['wav2lip', 'dinet', 'final', 'g4g'], ['psnr', 'ssim', 'lse_d[corpus]']]).all(axis=None)
        assert np.isfinite(second.loc[name].loc[['no_alignment', 'no_supervision', 'no_fusion', 'g4g'], 'psnr']).all()
    assert {('g4g', 'dinet'), ('g4g', 'wav2lip')} <= set(read('table_01_pairs')[['method', 'other']].itertuples(index=False, name=None))
    assert {'no_alignment', 'no_supervision', 'no_fusion'} <= set(read('table_02_pairs')['other'])
    assert {'wav2lip', 'dinet', 'final', 'g4g'} <= set(read('table_01_cost')['method']) and read('table_study')['mos_sync_reported'].notna().any()
    assert 'g4g' in set(read('fig_01')['network']) and {'heads', 'pictures'} == set(read('fig_alignment')['matrix'])
    states = read('fig_alignment').set_index(['state', 'matrix']); assert states.loc[('Contrastive loss alone', 'heads'), 'since'] == 'Untrained'
    assert np.isfinite(states.loc[('Contrastive loss alone', 'heads'), ['gap', 'gap_inside', 'rise', 'rise_low', 'rise_high']].astype(float)).all()


def test_rows_hold_a_value_or_a_reason(checkout):
    for path in (checkout/'runs'/'smoke'/'rows').glob('*.csv'):
        rows = pd.read_csv(path, keep_default_na=False)
        assert list(rows) == ['profile', 'method', 'set', 'clip', 'seed', 'metric', 'value', 'n_frames', 'protocol', 'reason']
        assert ((rows['value'] != '') | (rows['reason'] != '')).all()


def test_floors_and_ceilings_stand_where_they_must(checkout):
    table = pd.read_csv(checkout/'paper_figures'/'smoke'/'baselines.csv').set_index(['set', 'method'])
    for name in ('test', 'words', 'hd'):
        cells = table.loc[name]
        assert cells.loc['ground_truth', 'ssim'] == 1 and cells.loc['ground_truth', 'lmd'] == 0 and np.isinf(cells.loc['ground_truth', 'psnr'])
        assert 1 > cells.loc['reencoded', 'ssim'] > cells.loc['random_frame', 'ssim']
        assert np.isnan(cells.loc['shuffled_audio', 'psnr'])
    assert np.isfinite(table.loc[('test', 'shuffled_audio'), 'lse_d[corpus]']) and np.isfinite(table.loc[('test', 'ground_truth'), 'lse_d[corpus]'])


def test_provenance_says_what_made_it(checkout):
    record = json.loads((checkout/'paper_figures'/'smoke'/'provenance.json').read_text())
    assert record['profile'] == 'smoke' and record['device'] == 'cpu' and record['seeds'] == [0] and len(record['data']) == 64
    assert record['params']['profile']['landmarker']['steps'] == 12 and len(record['stages']) >= 12 and record['seconds'] > 0


def test_executed_notebooks_are_kept_without_stamps(checkout):
    kept = sorted((checkout/'runs'/'smoke'/'notebooks').glob('*.ipynb'))
    assert {path.stem for path in kept} == {stage.rpartition(':')[2] for stage in stage_graph(checkout)[0]}        # one for each
    for path in kept: assert 'papermill' not in nbformat.read(path, 4).metadata


def test_second_run_does_nothing(checkout):
    first = run(checkout, 'dvc', 'repro').stdout      # data.dvc is looked at once, since the copy has no cache
    assert 'Running stage' not in first and "Stage 'provenance@smoke' didn't change" in first
    assert 'Data and pipelines are up to date' in run(checkout, 'dvc', 'repro').stdout
    assert 'everything is up to date' in run(checkout, 'talkingface', 'repro').stdout


def test_prose_retrains_nothing(checkout):
    "Editing the words of a library notebook and exporting again changes no module, so no stage runs."
    path = checkout/'nbs'/'06_training'/'00_loop.ipynb'; nb = nbformat.read(path, 4)
    next(c for c in nb.cells if c.cell_type == 'markdown').source += '\n\nOne more sentence.'
    nbformat.write(nb, path)
    subprocess.run([str(Path(sys.executable).parent/'nbdev_export')], cwd=checkout, check=True)
    assert 'up to date' in run(checkout, 'talkingface', 'repro').stdout


def test_metrics_and_plots_are_known_to_dvc(checkout):
    shown = json.loads(run(checkout, 'dvc', 'metrics', 'show', '--json').stdout)
    assert any('scores-setup_a.json' in name for name in shown['']['data'])
    assert 'prepare@smoke' in run(checkout, 'dvc', 'dag').stdout


def test_experiments_change_a_parameter_and_compare(checkout):
    "`dvc exp run -S` reruns what the parameter touches, and no more; metrics and parameters can be compared."
    for command in (['config', 'user.name', 'test'], ['config', 'user.email', 'test@example.invalid'], ['add', '-A'], ['commit', '-qm', 'smoke']):
        subprocess.run(['git', '-C', str(checkout), *command], check=True, capture_output=True)
    done = run(checkout, 'dvc', 'exp', 'run', '-S', 'profiles.smoke.figures.strips=1')
    assert 'stabilized_sync_fig_strips@smoke' in done.stdout + done.stderr and "Stage 'train_generator@smoke-setup_a' didn't change" in done.stdout
    changed = json.loads(run(checkout, 'dvc', 'params', 'diff', '--json').stdout)
    difference = changed['params.yaml']['profiles.smoke.figures.strips']
    assert (difference['old'], difference['new']) == (2, 1)
    run(checkout, 'dvc', 'metrics', 'diff'); run(checkout, 'dvc', 'plots', 'show', '--json')


def test_one_loss_weight_reruns_its_row_and_what_reads_it(checkout):
    "dvc status after a change of one weight: that row's training, and nothing of any other row."
    path = checkout/'params.yaml'; text = path.read_text(); params = yaml.safe_load(text)
    try:
        params['rows']['setup_f']['losses']['triplet'] = .25
        path.write_text(yaml.safe_dump(params, sort_keys=False))
        stale = {line.rstrip(':') for line in run(checkout, 'dvc', 'status').stdout.splitlines() if line and not line[0].isspace()}
        assert 'train_generator@smoke-setup_f' in stale and not {n for n in stale if n.startswith(('train_', 'warm_up', 'evaluate@'))} - {'train_generator@smoke-setup_f'}
    finally: path.write_text(text)


def test_a_row_without_its_weights_says_so(checkout):
    "Setup C needs Wav2Vec2: every metric of it is a row with that reason, and the table prints it."
    rows = pd.read_csv(checkout/'runs'/'smoke'/'rows'/'setup_c.csv')
    assert rows['value'].isna().all() and rows['reason'].str.contains('2vec2|transformers').all()
    assert 'ec2' in (checkout/'paper_figures'/'smoke'/'stabilized_sync'/'table_ablation.md').read_text()


def test_the_ledger_has_the_four_verdicts_only(checkout):
    claims = pd.read_csv(checkout/'paper_figures'/'smoke'/'claims.csv')
    assert set(claims['verdict']) <= {'reproduced', 'not_reproduced', 'inconclusive', 'not_run'} and claims['id'].is_unique and set(claims['paper']) == {'A', 'B', 'C'}


def test_a_second_row_is_a_block(checkout):
    "A row that is added to params.yaml gets its stages, and the table waits for its scores."
    path = checkout/'params.yaml'; text = path.read_text()
    try:
        path.write_text(text.replace('\nrows:\n', '\nrows:\n  no_sync: {about: no sync loss, start: joint, reference: fixed, losses: {pixel: 10.0}}\n', 1))
        shown = run(checkout, 'dvc', 'dag', '--dot').stdout
        assert '"evaluate@smoke-no_sync" -> "table_baselines@smoke"' in shown.replace("'", '"')
    finally: path.write_text(text)


def test_benchmarks_run(checkout):
    done = run(checkout, 'talkingface', 'bench', '--profile', 'smoke', '--seconds', '.05', '--profile-only')
    assert 'render 256x256' in done.stdout and 'generator light, all losses of G: data_wait' in done.stdout
    assert 'generator g4g, all losses: part backward' in done.stdout and 'generator dinet, bf16, groups of 5: a frame' in done.stdout


def test_the_command_line_scores_and_dubs(checkout, tmp_path):
    "With the networks of the smoke run: rows of a set, and a video of a corpus clip with another's speech."
    runs = checkout/'runs'/'smoke'
    run(checkout, 'talkingface', 'evaluate', '--store', runs/'store', '--sets', 'words', '--judge', runs/'experts'/'judge', '--landmarker', runs/'landmarker',
        '--generated', runs/'generated'/'final', '--out', tmp_path/'rows.csv', '--profile', 'smoke')
    assert set(pd.read_csv(tmp_path/'rows.csv')['method']) == {'final'}
    words = checkout/'data'/'corpus'/'words'
    done = run(checkout, 'talkingface', 'generate', '--video', words/'words_0000_0.mp4', '--audio', words/'words_0001_0.flac', '--generator', runs/'generators'/'final',
               '--out', tmp_path/'out.mp4')
    from talkingface.data.video import probe
    assert probe(tmp_path/'out.mp4').frames == 29 and 'frames' in done.stdout
    done = run(checkout, 'talkingface', 'generate', '--video', words/'words_0000_0.mp4', '--audio', words/'words_0001_0.flac', '--generator', runs/'generators'/'g4g',
               '--out', tmp_path/'g4g.mp4')
    assert probe(tmp_path/'g4g.mp4').frames == 29 and "'stills'" in done.stdout


def test_an_expert_that_trained_never_scores(checkout):
    from talkingface.core import InputError, read_json
    from talkingface.metrics.sync import check_independent, load_scorer
    meta = read_json(checkout/'runs'/'smoke'/'generated'/'setup_a'/'meta.json')
    check_independent(load_scorer(checkout/'runs'/'smoke'/'experts'/'judge'), meta)
    with pytest.raises(InputError, match='trained this generator'): check_independent(load_scorer(checkout/'runs'/'smoke'/'experts'/'syncnet'), meta)


def test_footage_keeps_frames_and_time(checkout, tmp_path):
    "The path of `make real`, on two corpus clips laid out like real ones."
    for part in ('clips', 'audio', 'landmarks'): (tmp_path/'real'/part).mkdir(parents=True)
    for name in ('test_0000_0', 'test_0001_0'):
        for part, suffix in (('clips', '.mp4'), ('audio', '.flac'), ('landmarks', '.npz')):
            shutil.copy(checkout/'data'/'corpus'/'test'/f'{name}{suffix}', tmp_path/'real'/part)
    run(checkout, 'talkingface', 'real', '--folder', tmp_path/'real', '--out', tmp_path/'out', '--profile', 'smoke')
    report = json.loads((tmp_path/'out'/'report.json').read_text())
    assert report['kept']['frames'] == report['kept']['frames_made'] == 100 and report['prepared'] == {'given': 2, 'used': 2}
    assert (tmp_path/'out'/'strip.png').is_file() and len(pd.read_csv(tmp_path/'out'/'rows.csv')) == report['rows'] == 9


def test_other_data_is_prepared_again(checkout):
    "What identifies the corpus stands in the output of its stage: other clips make every stage after it stale."
    from talkingface.core import file_hash
    about = json.loads((checkout/'runs'/'smoke'/'corpus'/'corpus.json').read_text())
    assert about['content'] == file_hash(checkout/'data'/'corpus'/'manifest.csv')


def test_a_damaged_corpus_stops_the_pipeline(checkout):
    victim = checkout/'data'/'corpus'/'test'/'test_0000_0.flac'; kept = victim.read_bytes(); victim.chmod(0o644)
    try:
        victim.write_bytes(b'damaged')
        failed = run(checkout, 'talkingface', 'stage', 'nbs/papers/common/corpus.ipynb', '--name', 'corpus@smoke', '--set', 'profile=smoke',
                     'params=@profiles.smoke.corpus', 'seed=0', f'out={checkout.parent}/out', check=False)
        assert failed.returncode == 1 and 'test_0000_0.flac' in failed.stderr and 'Traceback' not in failed.stderr
    finally: victim.write_bytes(kept)


def test_unknown_parameters_are_refused(root):
    with pytest.raises(ParamsError, match="did you mean 'store'"): check_parameters(root/'nbs'/'papers'/'common'/'generate_others.ipynb', {'stor': 'x'})
    with pytest.raises(ParamsError, match='no parameters found'): check_parameters(root/'nbs'/'00_core.ipynb', {'x': 1})


def test_only_what_follows_a_change_runs():
    graph = {'prepare': set(), 'train': {'prepare'}, 'judge': {'prepare'}, 'score': {'train', 'judge'}}
    assert affected(graph, {'judge'}) == ['judge', 'score'] and affected(graph, set()) == []
    assert affected(graph, {'prepare'})[0] == 'prepare' and affected(graph, {'prepare'})[-1] == 'score'
