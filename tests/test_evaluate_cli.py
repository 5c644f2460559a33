"""`talkingface evaluate` at the command line: pairs in, files and an exit status out; every mistake is one message and status 2."""
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from test_evaluation import NAMES, clips, made, noisy, put, true  # noqa: F401, fixtures

from talkingface.cli import main

NONE = ['--judge', 'none', '--landmarker', 'none', '--avhubert', 'none', '--features', 'none', '--workers', '1']


@pytest.fixture(autouse=True)
def no_weights(tmp_path, monkeypatch):
    "Neither published weights nor a cache of the person who runs the tests."
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(tmp_path/'weights')); monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'cache'))


def run(*argv) -> int: return main(['evaluate', *map(str, argv)])


def test_one_folder_against_another(true, made, tmp_path, capsys):
    assert run('--generated', made, '--reference', true, '--out', tmp_path/'out', '--metrics', 'psnr', 'ssim', *NONE) == 0
    shown = capsys.readouterr().out
    assert 'psnr' in shown and 'n=4/4' in shown and '4 of 4 pairs scored, 4 now' in shown and 'report.html' in shown
    rows = pd.read_csv(tmp_path/'out'/'rows.csv')
    assert set(rows['method']) == {made.name} and len(rows) == 8 and (tmp_path/'out'/'report.html').is_file()
    assert run('--generated', made, '--reference', true, '--out', tmp_path/'out', '--metrics', 'psnr', 'ssim', *NONE) == 0
    assert '4 of 4 pairs scored, 0 now' in capsys.readouterr().out


def test_without_names_everything_available_is_scored(true, made, tmp_path, monkeypatch):
    "No networks here: the picture metrics."
    monkeypatch.chdir(tmp_path)
    assert run('--generated', made, '--reference', true, '--out', tmp_path/'out', '--workers', '1') == 0
    assert {'psnr', 'ssim', 'mse'} <= set(pd.read_csv(tmp_path/'out'/'rows.csv')['metric'])
    protocol = json.loads((tmp_path/'out'/'protocol.json').read_text())
    assert protocol['device'] == 'cpu' and protocol['networks'] == {} and 'alexnet' in protocol['unavailable']['lpips[alex]']


def test_several_methods(clips, true, made, tmp_path, capsys):
    for name, (frames, wav, _) in clips.items(): put(tmp_path/'b', name, noisy(frames, 3), wav)
    assert run('--method', f'first={made}', '--method', f'second={tmp_path/"b"}', '--reference', true, '--out', tmp_path/'out', '--metrics', 'psnr', *NONE) == 0
    assert 'first' in (shown := capsys.readouterr().out) and 'second' in shown
    assert pd.read_csv(tmp_path/'out'/'differences.csv').iloc[0][['method', 'other']].tolist() == ['second', 'first']


def test_a_manifest(true, made, tmp_path):
    (tmp_path/'list.csv').write_text(f'generated,reference,method\n{made/NAMES[0]}.mp4,{true/NAMES[0]}.mp4,ours\n')
    assert run('--manifest', tmp_path/'list.csv', '--out', tmp_path/'out', '--metrics', 'psnr', *NONE) == 0
    assert set(pd.read_csv(tmp_path/'out'/'rows.csv')['method']) == {'ours'}


def test_skipped_clips_are_named_and_give_status_1(true, made, tmp_path, capsys):
    folder = shutil.copytree(made, tmp_path/'made'); (folder/f'{NAMES[0]}.mp4').write_text('not a video'); (folder/f'{NAMES[1]}.mp4').unlink()
    assert run('--generated', folder, '--reference', true, '--out', tmp_path/'out', '--metrics', 'psnr', *NONE) == 1
    error = capsys.readouterr().err
    assert f'skipped made/{NAMES[0]}: generated: {NAMES[0]}.mp4 cannot be opened' in error and f'skipped made/{NAMES[1]}: no generated video' in error


def told(capsys, *argv) -> str:
    "The message of a call that must fail with status 2."
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith('talkingface evaluate: ') and 'Traceback' not in error
    return error


def test_nothing_scored(true, tmp_path, capsys):
    (tmp_path/'made').mkdir(); (tmp_path/'made'/f'{NAMES[0]}.mp4').write_text('not a video')
    assert run('--generated', tmp_path/'made', '--reference', true, '--out', tmp_path/'out', '--metrics', 'psnr', *NONE) == 2
    assert '0 of 4 pairs scored' in capsys.readouterr().out


def test_bad_usage_has_status_2(true, made, tmp_path, capsys):
    out = ['--out', tmp_path/'out', *NONE]
    assert '--out is missing' in told(capsys, '--generated', made, '--reference', true)
    assert '--reference DIR' in told(capsys, '--generated', made, *out)
    assert 'expected NAME=DIR' in told(capsys, '--method', 'ours', '--reference', true, *out)
    assert 'given twice' in told(capsys, '--method', 'a=x', '--method', 'a=y', '--reference', true, *out)
    assert 'no such folder' in told(capsys, '--generated', tmp_path/'absent', '--reference', true, *out)
    assert 'no videos under' in told(capsys, '--generated', tmp_path, '--reference', true, *out)
    assert 'no such file' in told(capsys, '--manifest', tmp_path/'absent.csv', *out)
    assert 'did you mean psnr' in told(capsys, '--generated', made, '--reference', true, '--metrics', 'psrn', *out)
    assert 'alexnet-owt-7be5be79.pth' in told(capsys, '--generated', made, '--reference', true, '--metrics', 'lpips', *out)
    assert 's3fd' in told(capsys, '--generated', made, '--reference', true, '--tracker', 'face-alignment', *out)
    assert 'at least 16 px' in told(capsys, '--generated', made, '--reference', true, '--size', 4, *out)
    (tmp_path/'file').write_text('')
    assert 'cannot write to' in told(capsys, '--generated', made, '--reference', true, '--metrics', 'psnr', '--out', tmp_path/'file', *NONE)
    assert 'meta.json' in told(capsys, '--generated', made, '--reference', true, '--metrics', 'lse_c', '--judge', tmp_path, '--out', tmp_path/'out')


def test_an_unknown_option_has_status_2(capsys):
    with pytest.raises(SystemExit) as stop: run('--generatd', 'x')
    assert stop.value.code == 2


def test_the_registry_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run('--list') == 0
    shown = capsys.readouterr().out
    assert 'psnr: available' in shown and 'PSNR, dB, 0 to infinity, higher is better; needs frames of the true clip' in shown
    assert 'fid[inception]: not available: weights file pt_inception' in shown and 'source: ' in shown and ' metrics are available' in shown
    assert shown.index('psnr: ') < shown.index('lmd: ') < shown.index('lse_d')
    assert run('--list', '--metrics', 'psnr') == 0
    assert 'ssim: ' not in capsys.readouterr().out


def test_an_interruption_has_status_130(true, made, tmp_path, capsys, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr('talkingface.evaluation.score_case', stop)
    assert run('--generated', made, '--reference', true, '--out', tmp_path/'out', '--metrics', 'psnr', *NONE) == 130
    assert 'what was finished is kept' in capsys.readouterr().err


def test_faces_against_a_store(clips, tmp_path, capsys):
    "What the pipeline generates: faces without loss, scored against the store that they were made from."
    from talkingface.data.clips import ClipStore, prepare
    from talkingface.data.corpora import open_corpus
    from talkingface.dubbing import save_faces
    for name in NAMES[:2]: put(tmp_path/'true', name, clips[name][0], clips[name][1], clips[name][2])
    prepare(open_corpus(tmp_path/'true'), tmp_path/'store', workers=1); store = ClipStore(tmp_path/'store')
    for clip in store: save_faces(tmp_path/'faces'/f'{clip.name}.safetensors', np.array(clip.faces)//2)
    def score(*more): return run('--store', tmp_path/'store', '--generated', tmp_path/'faces', '--out', tmp_path/'rows.csv', '--metrics', 'psnr', *more)
    assert score('--method', 'dark') == 0 and set(pd.read_csv(tmp_path/'rows.csv')['method']) == {'dark'}
    (tmp_path/'faces'/f'{store.names[0]}.safetensors').unlink(); assert score() == 1
    assert 'no frames for this clip' in capsys.readouterr().out
    (tmp_path/'store'/'store.json').write_text('{'); assert 'store.json' in told(capsys, '--store', tmp_path/'store', '--out', tmp_path/'rows.csv')
