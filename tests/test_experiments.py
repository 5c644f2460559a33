"""Rows, summaries, tables and figures: the schema is enforced, numbers are seeded, files have equal bytes."""
import numpy as np
import pandas as pd
import pytest

from talkingface.core import InputError, ParamsError, file_hash, read_json
from talkingface.experiments import (PUBLISHED_FIELDS, _advance, bootstrap_interval, check_rows, draw_table, how_many, metric_table, paired_difference,
                                     plotting, published, qualitative_strip, read_rows, run_caption, save_figure, save_table, small_print,
                                     strip_frames, summarise, table_latex, table_markdown, wrapped, write_provenance, write_rows)


def row(method='setup_a', clip='c0', metric='ssim', value=.5, **more):
    return dict(profile='smoke', method=method, set='test', clip=clip, seed=0, metric=metric, value=value, n_frames=10, protocol='p', reason='') | more


@pytest.fixture()
def rows():
    "Two methods and a ceiling on ten clips; `better` is better by .1 on every clip."
    gen, out = np.random.default_rng(0), []
    for i in range(10):
        level = gen.uniform(.4, .8)
        for method, gain in (('worse', 0), ('better', .1), ('ground_truth', 1 - level)):
            out += [row(method, f'c{i}', 'ssim', level + gain), row(method, f'c{i}', 'lse_d', 2 - level - gain)]
        out += [row('ground_truth', f'c{i}', 'psnr', np.inf, reason='identical to the ground truth'), row('better', f'c{i}', 'psnr', 20 + i)]
    return out


def test_rows_round_trip(tmp_path, rows):
    path = write_rows(tmp_path/'rows.csv', rows)
    assert read_rows(path).equals(check_rows(rows))
    assert file_hash(path) == file_hash(write_rows(tmp_path/'again.csv', read_rows(path)))


@pytest.mark.parametrize('bad, message', [
    ({'metric': 'pnsr'}, 'did you mean psnr'), ({'value': None}, 'neither value nor reason'), ({'value': float('nan')}, 'neither value nor reason'),
    ({'value': 'good'}, 'expected a number'), ({'speed': 3}, "unknown columns \\['speed'\\]")])
def test_bad_rows_are_refused(bad, message):
    with pytest.raises((InputError, ParamsError), match=message): check_rows([row() | bad])


def test_rows_without_a_column_or_twice_are_refused():
    short = row(); del short['seed']
    with pytest.raises(InputError, match="missing columns \\['seed'\\]"): check_rows([short])
    with pytest.raises(InputError, match='read twice'): check_rows([row(), row(value=.7)])


def test_profiles_do_not_mix(tmp_path, rows):
    a = write_rows(tmp_path/'a.csv', rows); b = write_rows(tmp_path/'b.csv', [r | {'profile': 'demo'} for r in rows])
    with pytest.raises(InputError, match='must not mix'): read_rows(a, b)
    with pytest.raises(InputError, match='several profiles'): metric_table(summarise(read_rows(a, b, profiles=2)))
    with pytest.raises(InputError, match='no such file'): read_rows(tmp_path/'none.csv')


def test_a_failed_clip_is_counted(rows):
    rows.append(row('better', 'c_silent', 'lse_d', None, reason='the audio is silent'))
    line = summarise(rows).set_index(['method', 'metric']).loc[('better', 'lse_d')]
    assert (line.n, line.given) == (10, 11)
    assert 'LSE-D on 10 of 11 clips' in table_markdown(metric_table(summarise(rows)))


def test_bootstrap_is_seeded_and_independent_of_other_rows(rows):
    full, part = summarise(rows), summarise([r for r in rows if r['method'] != 'worse'])
    same = full[full.method != 'worse'].reset_index(drop=True)
    pd.testing.assert_frame_equal(same, part)
    other = summarise(rows, seed=1)
    assert (full['mean'] == other['mean']).all() and not full['low'].equals(other['low'])


def test_bootstrap_covers_the_mean():
    "Of 200 samples, about 95 % of the intervals hold the true mean."
    gen = np.random.default_rng(0)
    hits = sum(low <= 0 <= high for low, high in (bootstrap_interval(gen.normal(size=40), i) for i in range(200)))
    assert 175 <= hits <= 200
    assert all(np.isnan(bootstrap_interval([1.])))


def test_infinite_values_stay_out_of_means(rows):
    s = summarise(rows + [row('better', 'same', 'psnr', np.inf, reason='identical to the ground truth')]).set_index(['method', 'metric'])
    assert s.loc[('ground_truth', 'psnr'), 'mean'] == np.inf
    assert s.loc[('better', 'psnr'), 'mean'] == pytest.approx(24.5) and (s.loc[('better', 'psnr'), ['n', 'given']] == [10, 11]).all()


def test_seeds_are_averaged_per_clip(rows):
    both = [r for r in rows if r['metric'] == 'ssim'] + [r | {'seed': 1} for r in rows if r['metric'] == 'ssim']
    pd.testing.assert_frame_equal(summarise(both), summarise([r for r in rows if r['metric'] == 'ssim']))


def test_paired_difference(rows):
    gap = paired_difference(rows, 'better', 'worse', 'lse_d', 'test')
    assert gap['mean'] == pytest.approx(-.1) and gap['better'] is True and gap['n'] == 10
    assert paired_difference(rows, 'worse', 'better', 'ssim', 'test')['better'] is False


def test_best_is_bold_and_references_do_not_compete(rows):
    lines = table_markdown(metric_table(summarise(rows), metrics=['ssim', 'lse_d'])).splitlines()
    bold = {l.split('|')[1].strip(): l.count('**') for l in lines if l.startswith('|')}
    assert bold['Better'] == 4 and bold['Worse'] == 0 and bold['*Ground truth*'] == 0


def test_reported_values_stand_beside_measured_ones(rows, root):
    told = published(root/'nbs'/'papers'/'published.csv', paper='av_expert', table='table_04').replace({'row': {'unsupervised': 'better'}})
    table = metric_table(summarise(rows), metrics=['ssim', 'lse_d'], reported=told, reported_sets={'test': 'LRS2'})
    assert table.set_index('method').loc['better', 'lse_d_reported'] == 6.301
    assert '6.30' in table_latex(table) and r'\uparrow' in table_latex(table)


def test_published_numbers(root):
    table = published(root/'nbs'/'papers'/'published.csv')
    assert tuple(table) == PUBLISHED_FIELDS and not table.duplicated(['paper', 'table', 'row', 'set', 'metric']).any()
    assert set(table.paper) == {'stabilized_sync', 'av_expert', 'g4g'} and table.source.str.len().gt(5).all()
    cell = lambda **where: published(root/'nbs'/'papers'/'published.csv', **where)['value'].item()
    assert cell(paper='stabilized_sync', row='ours_vqfr', metric='lse_c') == 8.52
    assert cell(paper='g4g', table='table_01', set='HDTF', row='ours', metric='psnr') == 27.556
    mse = table[(table.paper == 'g4g') & (table.metric == 'mse')]
    assert mse['value'].between(.001, .006).all()
    with pytest.raises(InputError, match='there are'): published(root/'nbs'/'papers'/'published.csv', paper='b')


def test_files_have_equal_bytes(tmp_path, rows):
    "Made twice from nothing, tables and figures are the same files."
    def make(folder):
        folder.mkdir()
        save_table(metric_table(summarise(rows)), folder/'table', 'A table', 'Profile smoke.')
        frames = np.random.default_rng(0).integers(0, 256, (20, 3, 24, 24), dtype=np.uint8)
        fig, data = qualitative_strip({'generated': frames, 'ground truth': frames}, strip_frames(np.arange(20.), 4), 'A strip', 'c0')
        save_figure(fig, folder/'strip', data)
        return {p.name: file_hash(p) for p in sorted(folder.iterdir())}
    first, second = make(tmp_path/'a'), make(tmp_path/'b')
    assert first == second
    assert set(first) == {f'table{s}' for s in ('.csv', '.md', '.pdf', '.png', '.tex')} | {f'{n}{s}' for n in ('strip',) for s in ('.csv', '.pdf', '.png')}


def test_style_leaves_no_trace(tmp_path):
    "Drawing changes no global setting of matplotlib."
    import matplotlib
    before = dict(matplotlib.rcParams)
    frames = np.zeros((20, 3, 24, 24), np.uint8)
    qualitative_strip({'generated': frames}, strip_frames(np.arange(20.), 4), 'A strip', 'c0')
    assert dict(matplotlib.rcParams) == before


def test_provenance_says_what_made_it(tmp_path):
    found = read_json(write_provenance(tmp_path, 'smoke', {'steps': 3}, [0], 'cpu', 1.5, data='abc'))
    assert {'profile', 'git', 'data', 'params', 'device', 'seeds', 'seconds', 'versions'} <= set(found)


def test_no_line_is_too_wide_and_none_is_a_lone_word():
    text = 'Mean over clips of the set test, positions with speech; band: 95 % interval over clips. Grey bar: nothing changed at all by it.'
    for width in range(60, 700, 7):
        lines = wrapped(text, width); wide = [_advance(line, 7.5) for line in lines]
        assert ' '.join(lines) == text and max(wide) <= width*1.01
        assert len(lines) == 1 or len(lines) > 4 or wide[-1] > .12*width
    assert wrapped('', 100) == []


def test_a_figure_grows_with_its_small_print():
    with plotting() as plt:
        fig, _ = plt.subplots(figsize=(5, 2)); plt.close(fig)
    small_print(fig, ['Short.'], 'Title'); assert fig.get_figheight() == 2 and fig._supxlabel.get_text() == 'Short.'
    small_print(fig, ['word '*200]); assert fig.get_figheight() > 2.3


def test_notes_stay_within_the_rules_of_a_table(rows):
    fig = draw_table(metric_table(summarise(rows)), 'A table', 'A caption of many words, which goes on and on and on and on, as they do. '*4)
    with plotting():
        fig.draw_without_rendering(); right = max(line.get_window_extent().x1 for line in fig.axes[0].lines)
        assert max(text.get_window_extent().x1 for text in fig.axes[0].texts) <= right + 2


def test_small_numbers_have_digits_and_published_ones_keep_theirs():
    some = [row(m, f'c{i}', 'lse_c_variance', v) for m, v in (('a', .0076), ('b', .0044)) for i in range(2)]; table = metric_table(summarise(some))
    assert '0.00760' in table_markdown(table) and '**0.00440**' in table_markdown(table)
    floor = metric_table(summarise([*some, *(row('static_frame', f'c{i}', 'lse_c_variance', .3) for i in range(2))])); assert '0.00760' in table_markdown(floor)
    table['lse_c_variance_reported'] = [.012, np.nan]; table['lse_c_variance_confirmed'] = [True, np.nan]; assert '| 0.012 |' in table_markdown(table)


def test_ranges_of_counts():
    assert [how_many(n, 'training') for n in ([3, 6], [1], [6, 6])] == ['3 to 6 trainings', '1 training', '6 trainings']
    assert run_caption('x', seeds=range(6)) == 'Profile x, seeds 0 to 5.' and run_caption('x', seeds=[0, 1, 2]) == 'Profile x, seeds 0, 1, 2.'
