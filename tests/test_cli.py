"""Bad input at the command line: one message that says what was expected, what came and what to do; no traceback; status 1."""
import subprocess
import sys

import numpy as np
import pytest

from talkingface.cli import main
from talkingface.data.video import write_video


@pytest.fixture
def folder(tmp_path):
    "A folder of videos in which something is wrong with each."
    videos = tmp_path/'videos'; videos.mkdir()
    (videos/'empty.mp4').write_bytes(b'')
    (videos/'text.mp4').write_text('not a video')
    write_video(videos/'untracked.mp4', np.zeros((10, 64, 64, 3), np.uint8))
    return tmp_path


def told(capsys, *argv, status=1) -> str:
    assert main([str(a) for a in argv]) == status
    error = capsys.readouterr().err
    assert 'Traceback' not in error and error.startswith('talkingface ')
    return error


def test_help_of_every_command(capsys):
    for command in ('corpus', 'prepare', 'doctor', 'train', 'generate', 'evaluate', 'weights', 'study', 'repro', 'stage', 'real', 'bench'):
        with pytest.raises(SystemExit) as stop: main([command, '--help'])
        assert stop.value.code == 0 and 'usage' in capsys.readouterr().out


def test_wrong_usage_has_status_2(capsys):
    with pytest.raises(SystemExit) as stop: main(['prepare'])
    assert stop.value.code == 2 and '--corpus' in capsys.readouterr().err


def test_no_such_folder(capsys, tmp_path):
    assert 'no such folder' in told(capsys, 'prepare', '--corpus', tmp_path/'absent', '--out', tmp_path/'store')


def test_unusable_clips_are_rows_and_status_1(capsys, folder):
    assert main(['prepare', '--corpus', str(folder/'videos'), '--out', str(folder/'store'), '--workers', '1']) == 1
    assert '0 of 3 clips used' in capsys.readouterr().out
    table = (folder/'store'/'prepare.csv').read_text()
    assert all(name in table for name in ('empty', 'text', 'untracked'))


def test_no_such_store(capsys, tmp_path):
    assert 'run prepare' in told(capsys, 'train', 'expert', '--store', tmp_path, '--out', tmp_path/'out')


def test_mistyped_setting(capsys, folder):
    main(['prepare', '--corpus', str(folder/'videos'), '--out', str(folder/'store'), '--workers', '1']); capsys.readouterr()
    assert "did you mean 'steps'" in told(capsys, 'train', 'expert', '--store', folder/'store', '--out', folder/'out', '--params', '{step: 3}')
    assert 'expected a block' in told(capsys, 'train', 'expert', '--store', folder/'store', '--out', folder/'out', '--params', 'steps')


def test_no_trained_generator(capsys, folder):
    assert 'meta.json' in told(capsys, 'generate', '--video', 'a.mp4', '--audio', 'a.wav', '--generator', folder, '--out', folder/'o.mp4')


def test_missing_detector_weights_are_named(capsys, folder, monkeypatch):
    monkeypatch.setenv('TALKINGFACE_WEIGHTS', str(folder))
    error = told(capsys, 'prepare', '--corpus', folder/'videos', '--out', folder/'store', '--tracker', 'face-alignment', '--workers', '1')
    assert str(folder) in error and '.pth' in error


def test_real_clips_need_a_folder(capsys, monkeypatch):
    monkeypatch.delenv('TALKINGFACE_REAL_CLIPS', raising=False)
    assert 'TALKINGFACE_REAL_CLIPS' in told(capsys, 'real')


def test_the_module_runs_as_a_program(root):
    done = subprocess.run([sys.executable, '-m', 'talkingface', 'corpus', 'check', '--root', 'absent'], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and 'absent' in done.stderr and 'Traceback' not in done.stderr


def test_import_is_quick_and_light():
    "`import talkingface` loads neither torch nor weights, and `import talkingface.core` no heavy package."
    code = "import sys, talkingface, talkingface.core; heavy = {'torch', 'cv2', 'av', 'librosa', 'pandas', 'matplotlib'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_path_that_cannot_be_written(capsys, folder):
    (folder/'file').write_text('')
    assert 'file' in told(capsys, 'corpus', 'build', '--out', folder/'file'/'corpus', '--spec', '{train: {identities: 1, clips: 1, frames: 5, size: 64}, '
                          'val: {identities: 0}, test: {identities: 0}, words: {identities: 0}, hd: {identities: 0}}', '--workers', 1)


def test_a_stage_needs_its_profile(capsys):
    assert 'profile' in told(capsys, 'stage', 'nbs/papers/common/generate_others.ipynb', '--name', 'x', '--set', 'seed=0')


def test_unknown_devices_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as stop: main(['real', '--device', 'cdua'])
    assert stop.value.code == 2 and 'cdua' in capsys.readouterr().err


def test_a_truncated_video_and_a_damaged_store(capsys, folder):
    "Both at the command line: the video is a row with its reason, the store an error that says `rerun prepare`."
    whole = write_video(folder/'videos'/'cut.mp4', np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)); data = whole.read_bytes()
    whole.write_bytes(data[:len(data)//2])
    main(['prepare', '--corpus', str(folder/'videos'), '--out', str(folder/'store'), '--workers', '1']); capsys.readouterr()
    assert 'cut' in (folder/'store'/'prepare.csv').read_text()
    (folder/'store'/'store.json').write_text('{')
    assert 'store.json' in told(capsys, 'evaluate', '--store', folder/'store', '--out', folder/'rows.csv', status=2)


def test_known_weights_are_listed(capsys, tmp_path):
    "Every known file with what it is for, its licence, where it belongs, and its hash if it is there."
    (tmp_path/'syncnet_v2.model').write_bytes(b'x')
    assert main(['weights', '--folder', str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f'in {tmp_path}' in shown and 'TALKINGFACE_WEIGHTS' in shown and '1 of ' in shown
    for name in ('lipsync_expert.pth', 'base_vox_iter5.pt', 's3fd-619a316812.pth'): assert f'{name}: absent' in shown
    assert 'sha256 2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881' in shown     # of the letter x
    assert 'non-commercial' in shown and 'licence' in shown and 'from: ' in shown


def test_weights_are_converted(capsys, tmp_path):
    "A published layout becomes safetensors and meta.json; a file that is none is refused."
    import torch
    from talkingface.core import read_json
    from talkingface.experts.checkpoints import build_expert, load_expert
    torch.save({'state_dict': build_expert({'name': 'syncnet'}).state_dict()}, tmp_path/'lipsync_expert.pth')
    assert main(['weights', 'convert', str(tmp_path/'lipsync_expert.pth'), '--out', str(tmp_path/'syncnet')]) == 0
    meta = read_json(tmp_path/'syncnet'/'meta.json')
    assert meta['config']['name'] == 'syncnet' and 'non-commercial' in meta['licence'] and len(meta['sha256']) == 64
    assert load_expert('syncnet', tmp_path/'syncnet').config['width'] == 1
    capsys.readouterr()
    assert '--out FOLDER' in told(capsys, 'weights', 'convert', tmp_path/'lipsync_expert.pth')
    (tmp_path/'text.pth').write_text('not weights')
    assert 'text.pth' in told(capsys, 'weights', 'convert', tmp_path/'text.pth', '--out', tmp_path/'out')
