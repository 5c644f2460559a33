"""params.yaml: every block of every profile fills its dataclass, and a wrong one is refused by name."""
import re

import pytest
import yaml

from talkingface.behaviour import BehaviourParams
from talkingface.core import ParamsError, typed
from talkingface.data.corpora import corpus_spec
from talkingface.experts.checkpoints import build_expert
from talkingface.generators.base import generator_class
from talkingface.metrics.base import metric_info
from talkingface.metrics.report import CLIP_SCORES, SET_SCORES
from talkingface.pipeline import params_block, read_params, select_profiles, stage_parameters
from talkingface.robustness import RobustnessParams
from talkingface.training.avhubert import AVHubertParams
from talkingface.training.experts import ExpertParams, LandmarkParams
from talkingface.training.features import FeatureParams
from talkingface.training.generators import PLACES, row_settings
from talkingface.losses.objective import LOSSES


@pytest.fixture(scope='module')
def params(root): return read_params(root)


@pytest.mark.parametrize('profile', ['smoke', 'demo', 'medium', 'bench', 'paper'])
def test_every_block_fills_its_dataclass(params, profile):
    block = params['profiles'][profile]; place = {'device': block['device'], 'seed': block['seed']}
    for name in params['experts']: typed(ExpertParams, {**place, **block['experts'][name]}, f'{profile}.experts.{name}')
    typed(AVHubertParams, {**place, **block['avhubert']}, f'{profile}.avhubert'); typed(RobustnessParams, block['robustness'])
    for name, reader in params['readers'].items():
        typed(AVHubertParams, {**place, **block['avhubert'], **block['pretrained'][reader['start']], **block['readers'][name]}, f'{profile}.readers.{name}')
    assert {*params['compared'], *params['reported']} <= {*params['experts'], *params['readers']}
    typed(FeatureParams, {**place, **block['features']}); typed(BehaviourParams, block['behaviour'])
    typed(LandmarkParams, {**place, **block['landmarker']}); corpus_spec(block['corpus']['build'])
    typed(FeatureParams, {**place, **block['perceptual']})
    for name in block['evaluate']['metrics']: assert metric_info(name).name in CLIP_SCORES.keys() | SET_SCORES.keys()
    for part in ('warm_ups', 'heads', 'silencers', 'rivals', 'rows'):
        for row in params[part].values():
            what, settings = row_settings(row, block['generator'], {}, **place)
            generator_class(what.generator['name'])
            assert settings.steps > 0 and set(what.losses) <= set(LOSSES) and (what.expert is None or what.expert in {*params['experts'], *params['readers']})


def test_losses_of_paper_a_have_its_weights(params):
    "L = L_GAN + 10 L_pixel + L_per + 2 L_ss + 0.5 L_at."
    total = dict(adversarial=1., pixel=10., perceptual=1., stabilized_sync=2., adaptive_triplet=.5)
    assert params['rows']['setup_g']['losses'] == params['rows']['final']['losses'] == total
    assert params['silencers']['silent']['losses'].keys() & {n for n in LOSSES if 'sync' in n} == set()


def test_what_rows_name_is_there(params):
    assert all(row['start'] == 'syncnet' for row in params['silencers'].values())           # as their stage in dvc.yaml says
    assert all(row['start'] == name for name, row in params['rivals'].items())
    for profile in params['profiles'].values():
        seeds = lambda name: profile['generator'].get('seeds_of', {}).get(name, profile['generator']['seeds'])
        assert profile['generator'].get('seeds_of', {}).keys() <= {*params['warm_ups'], *params['heads'], *params['silencers'], *params['rivals'], *params['rows']}
        for name, row in (params['silencers'] | params['rivals'] | params['rows']).items():
            assert seeds(name) <= min(seeds(of) for of in (row['start'], row.get('silence')) if of), name
    for row in params['rows'].values():
        assert row['start'] in params['warm_ups'] and row.get('silence') in {None, *params['silencers'], *params['rivals']} and row.keys() <= set(PLACES)
    for name in (*params['leak'], *params['exploitation']): assert name in params['rows']
    for how in params['others'].values(): assert how.get('of', 'final') in params['rows'] and how.get('silencer', 'silent') in {*params['silencers'], *params['rivals']}


def test_neighbouring_rows_differ_in_one_thing(params):
    "What a table compares must differ by what its line says and by nothing else."
    rows = {n: {k: v for k, v in r.items() if k not in ('about', 'sets')} for n, r in params['rows'].items()}
    differ = lambda a, b: {k for k in rows[a].keys() | rows[b].keys() if rows[a].get(k) != rows[b].get(k)}
    for a, b, what in (('setup_a', 'setup_b', {'start'}), ('setup_b', 'setup_d', {'silence'}), ('setup_d', 'setup_e', {'losses'}), ('setup_e', 'setup_g', {'losses'}),
                       ('setup_f', 'setup_g', {'losses'}), ('setup_e', 'ref_random', {'silence'}), ('setup_e', 'ref_wav2lip', {'silence'}), ('ref_random', 'ref_fixed', {'start', 'reference'}),
                       ('setup_b', 'setup_c', {'start'}), ('setup_e', 'ref_closed', {'silence', 'reference'}), ('setup_e', 'ref_lowest', {'silence', 'reference'}),
                       ('setup_d', 'sync_penalty', {'losses'}), ('av_plain', 'av_gap', {'losses'}), ('av_plain', 'av_penalty', {'losses'}), ('setup_e', 'ss_floor', {'options'}),
                       ('setup_e', 'ss_silent', {'options'}), ('setup_g', 'final', {'start', 'expert'}), ('setup_d', 'av_plain', {'expert'}), ('setup_e', 'av_stabilized', {'expert'}), ('setup_d', 'sync_gap', {'losses'}), ('visual_visual', 'multimodal', {'losses', 'since'}),
                       ('multimodal', 'unsupervised', {'losses', 'since'}), ('setup_a', 'unsupervised', {'losses', 'since', 'expert'}), ('setup_a', 'joint_stabilized', {'losses', 'expert'})):
        assert differ(a, b) == what, (a, b)


def test_the_generator_stage_waits_for_what_its_rows_name(root, params):
    deps = yaml.safe_load((root/'dvc.yaml').read_text())['stages']['train_generator']['deps']
    names = {row.get('expert') for part in ('rows', 'silencers', 'rivals') for row in params[part].values()} | {w.get('audio') for w in params['warm_ups'].values()}
    assert names - {None, 'joint', 'wav2vec2'} <= {d.rsplit('/', 1)[1] for d in deps if '/experts/' in d and 'runs/' in d}
    assert {'warm_ups', 'silencers', 'perceptual'} <= {d.rsplit('/', 1)[1] for d in deps}


def test_stages_see_the_ratings_that_studies_names(root, params):
    "What reads ratings has the block and the folder among what it depends on."
    stages = yaml.safe_load((root/'dvc.yaml').read_text())['stages']
    readers = {n: s for n, s in stages.items() if '@studies' in s['cmd']}; assert set(readers) == {'av_expert_table_study', 'g4g_table_study', 'ledger'}
    for name, stage in readers.items():
        assert 'paper_figures/studies' in stage['deps'] and {'ledger': 'studies'}.get(name, f"studies.{name.removesuffix('_table_study')}") in stage['params']
    assert (root/'paper_figures/studies/README.md').is_file() and set(params['studies']) == {'av_expert', 'g4g'}


@pytest.mark.parametrize('profile', ['smoke', 'demo', 'medium', 'bench', 'paper'])
def test_the_judge_trains_nothing(params, profile):
    trainers = {row.get('expert') for part in ('rows', 'silencers', 'rivals', 'warm_ups', 'heads') for row in params[part].values()}
    assert not trainers & {'judge', 'avhubert', 'avhubert_contrast'}
    readers = params['readers']; assert readers['avhubert_trainer']['start'] not in {readers[n]['start'] for n in ('avhubert', 'avhubert_contrast')}
    build_expert(params['profiles'][profile]['experts']['judge']['net'])


def changed(root, tmp_path, change) -> None:
    text = (root/'params.yaml').read_text(); (tmp_path/'params.yaml').write_text(change(text)); (tmp_path/'settings.ini').write_text('')


@pytest.mark.parametrize('change, message', [
    (lambda t: t.replace('landmarker:', 'landmaker:'), "unknown key 'landmaker', did you mean 'landmarker'"),
    (lambda t: t.replace('run: [', 'run: [demmo, '), "did you mean 'demo'"),
    (lambda t: re.sub(r'\n    figures:.*', '', t), 'missing figures'),
    (lambda t: t + '\n  broken: [', 'not valid YAML'),
    (lambda t: t.replace('\nprofiles:', '\nprofile:', 1), "did you mean 'profiles'"),
    (lambda t: t.replace('prepare: {size:', 'prepare: {sizes:', 1), "did you mean 'size'"),
    (lambda t: t.replace('device: cpu', 'device: cup', 1), 'device'),
    (lambda t: 'demo', 'expected a block'),
    (lambda t: re.sub(r'\n      seeds: \d+', r'\g<0>\n      seeds_of: {setup_bb: 2}', t, count=1), "seeds_of: unknown key 'setup_bb', did you mean 'setup_b'"),
    (lambda t: re.sub(r'\n      seeds: \d+', r'\g<0>\n      seeds_of: {setup_b: 0}', t, count=1), 'seeds_of.setup_b: expected at least 1 training, got 0'),
    (lambda t: re.sub(r'\n      seeds: \d+', r'\g<0>\n      seeds_of: [setup_b]', t, count=1), 'seeds_of: expected a block of keys'),
    (lambda t: t.replace("g4g: {collected: '', profile: ''", "g4g: {collected: scores, profile: demo"), 'studies.g4g.collected: expected a folder within paper_figures/studies/'),
    (lambda t: t.replace("g4g: {collected: '', profile: ''", "g4g: {collected: paper_figures/studies/g4g, profile: ''"), 'studies.g4g.profile'),
    (lambda t: t.replace("g4g: {collected: ''", "g4g: {colected: ''"), "did you mean 'collected'"),
], ids=['key', 'profile', 'missing', 'yaml', 'top', 'block', 'device', 'text', 'row', 'none', 'list', 'ratings', 'rated', 'study'])
def test_a_wrong_file_is_refused(root, tmp_path, change, message):
    changed(root, tmp_path, change)
    with pytest.raises(ParamsError, match=re.escape(message)): read_params(tmp_path)


def test_a_mistyped_value_is_refused(params):
    block = {**params['profiles']['smoke']['experts']['syncnet'], 'steps': '12'}
    with pytest.raises(ParamsError, match='steps: expected int'): typed(ExpertParams, block)
    with pytest.raises(ParamsError, match="did you mean 'precision'"): typed(ExpertParams, {'presicion': 'bf16-mixed'})


def test_numbers_are_numbers(root):
    "YAML reads 1e-4 as text; a file full of numbers should hold none of those."
    assert not re.findall(r'[ :]\d+e-?\d+', (root/'params.yaml').read_text())


def test_profiles_are_selected_by_one_line(root, tmp_path):
    changed(root, tmp_path, lambda t: t); before = (tmp_path/'params.yaml').read_text()
    select_profiles(tmp_path, ['smoke'])
    after = (tmp_path/'params.yaml').read_text()
    assert yaml.safe_load(after)['run'] == ['smoke'] and sum(a != b for a, b in zip(before.splitlines(), after.splitlines())) == 1
    with pytest.raises(ParamsError, match="did you mean 'medium'"): select_profiles(tmp_path, ['medim'])


def test_stage_parameters_take_blocks(root):
    got = stage_parameters(root, ['row=@rows.setup_a', 'seed=@profiles.demo.seed', 'out=runs/x'])
    assert got['row']['expert'] == 'syncnet' and got['seed'] == 0 and got['out'] == 'runs/x'
    with pytest.raises(ParamsError, match="did you mean 'setup_a'"): stage_parameters(root, ['row=@rows.setup_aa'])
    assert params_block({'a': {'b': None}}, 'a.b') is None
