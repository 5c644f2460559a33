"Training: resume bit for bit, kills, foreign and dangerous checkpoints, plateaus, imports."
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from talkingface.core import CheckpointError, TalkingFaceError
from talkingface.training.loop import (Callback, EarlyStop, PlateauWarning, Validate, checkpoints, finish_run, fit, load_model,
                                       load_published, load_weights, make_fabric, save_model, warmup_cosine)

torch.set_num_threads(1)


class Net(nn.Module):
    "Convolution, batch norm and dropout: everything that has state or draws numbers."
    def __init__(self, width=8):
        super().__init__()
        self.config = dict(name='net', width=width)
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(.3), nn.Conv2d(width, 3, 3))

    def forward(self, x): return self.layers(x).mean((2, 3))


def build(config):
    assert config.pop('name') == 'net'
    return Net(**config)


class Batches(Dataset):
    def __getitem__(self, k):
        return {'x': torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(k))}


class Exact(Callback):
    "Keeps the losses as they are."
    def __init__(self): self.losses = []
    def on_step(self, run): self.losses.append((run.step, run.logs['loss'].item(), run.logs['draws']))


def train(out, steps=20, die_before=None, precision='32-true', workers=0, every=5, callbacks=(), lr=1e-2, **options):
    fabric = make_fabric(precision=precision, threads=1)
    torch.manual_seed(1)
    net = fabric.setup_module(Net().to(memory_format=torch.channels_last))
    adam = fabric.setup_optimizers(torch.optim.AdamW(net.parameters(), lr))

    def step(k, batch):
        if k == die_before: raise KeyboardInterrupt
        noise = np.random.normal(), random.random(), torch.rand(1).item()
        loss = (net(batch['x']) - batch['x'].mean((2, 3)) - noise[0]).square().mean()
        adam.zero_grad(); fabric.backward(loss); adam.step()
        return {'loss': loss.detach(), 'draws': sum(noise)}

    exact = Exact()
    run = fit(fabric, {'net': net}, {'net': adam}, Batches(), step, steps, out, {'lr': lr, 'steps': steps}, seed=3,
              schedule=warmup_cosine(5), callbacks=(*callbacks, exact), log_every=3, checkpoint_every=every, workers=workers, **options)
    return run, net, exact.losses


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize('precision', ['32-true', 'bf16-mixed'])
def test_resume_is_bit_for_bit(tmp_path, precision):
    whole, net, losses = train(tmp_path/'whole', precision=precision)
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'broken', die_before=13, precision=precision)
    assert [p.name for p in checkpoints(tmp_path/'broken')] == ['step_00000010']
    random.seed(99); np.random.seed(99); torch.manual_seed(99)
    joined, again, tail = train(tmp_path/'broken', precision=precision)
    assert joined.started_at == 10 and tail == losses[10:]
    assert same(net, again)
    assert (tmp_path/'whole/log.csv').read_bytes() == (tmp_path/'broken/log.csv').read_bytes()


def test_workers_change_nothing(tmp_path):
    _, a, x = train(tmp_path/'none'); _, b, y = train(tmp_path/'one', workers=2)
    assert x == y and same(a, b)


def test_a_finished_run_does_nothing(tmp_path):
    run, net, _ = train(tmp_path/'run')
    finish_run(run, net.module, {'error': .25})
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'run').iterdir()}
    again, _, losses = train(tmp_path/'run')
    assert losses == [] and again.finished['metrics'] == {'error': .25}
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path/'run').iterdir()}
    assert same(load_model(tmp_path/'run', build), net.module)


def test_another_config_is_refused_or_begins_anew(tmp_path):
    train(tmp_path/'run')
    with pytest.raises(CheckpointError, match='config.lr: 0.01 there, 0.02 now'): train(tmp_path/'run', lr=.02)
    with pytest.raises(CheckpointError, match="data: '' there, 'abc' now"): train(tmp_path/'run', data='abc')
    with pytest.warns(UserWarning, match='training starts anew'): run, _, losses = train(tmp_path/'run', lr=.02, on_change='restart')
    assert run.started_at == 0 and len(losses) == 20


def test_kill_in_the_middle_loses_nothing(tmp_path):
    "SIGKILL at an arbitrary moment of a run that writes a checkpoint in every step."
    script = tmp_path/'run.py'
    script.write_text(textwrap.dedent(f"""
        import sys, time; sys.path.insert(0, {os.path.dirname(__file__)!r})
        import test_training as t
        class Slow(t.Callback):
            def on_step(self, run): print(run.step, flush=True); time.sleep(.01)
        t.train({str(tmp_path/'killed')!r}, steps=40, every=1, callbacks=(Slow(),))
        """))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if int(line) >= 19: break
    process.send_signal(signal.SIGKILL); process.wait()
    joined, net, _ = train(tmp_path/'killed', steps=40, every=1)
    _, whole, _ = train(tmp_path/'whole', steps=40, every=10)
    assert joined.started_at >= 18 and same(net, whole)
    assert (tmp_path/'whole/log.csv').read_bytes() == (tmp_path/'killed/log.csv').read_bytes()
    assert not list((tmp_path/'killed').rglob('*.part'))


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    import talkingface.training.loop as loop
    write, calls = loop.save_file, []
    def full(*args):
        calls.append(1)
        if len(calls) > 4: raise OSError(28, 'No space left on device')
        return write(*args)
    monkeypatch.setattr(loop, 'save_file', full)
    with pytest.raises(OSError): train(tmp_path/'run')
    monkeypatch.undo()
    assert [p.name for p in checkpoints(tmp_path/'run')] == ['step_00000005']
    _, net, _ = train(tmp_path/'run'); _, whole, _ = train(tmp_path/'whole')
    assert same(net, whole)


def test_checkpoint_is_readable_and_has_no_pickle(tmp_path):
    train(tmp_path/'run', describe=lambda k: {'weights': {'pixel': 1., 'sync': 0. if k < 8 else .3}})
    [folder] = checkpoints(tmp_path/'run')
    assert {p.suffix for p in folder.iterdir()} == {'.safetensors', '.json'}
    meta = json.loads((folder/'meta.json').read_text())
    assert meta['step'] == 20 and meta['weights']['sync'] == .3 and meta['config']['lr'] == .01
    assert {'git', 'data', 'metrics', 'versions', 'device', 'seconds', 'data_wait'} <= meta.keys()


def test_damaged_checkpoints_say_so(tmp_path):
    train(tmp_path/'run')
    [folder] = checkpoints(tmp_path/'run')
    (folder/'model.safetensors').write_bytes((folder/'model.safetensors').read_bytes()[:100])
    with pytest.raises(CheckpointError, match='is damaged'): train(tmp_path/'run')
    (folder/'model.safetensors').unlink()
    with pytest.raises(CheckpointError, match='lacks model.safetensors'): train(tmp_path/'run')


class Bomb:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_runs_code_is_refused(tmp_path):
    trap = str(tmp_path/'trap')
    torch.save({'state_dict': Bomb(trap)}, tmp_path/'bomb.pth')
    (tmp_path/'bare.pth').write_bytes(pickle.dumps(Bomb(trap)))
    for name in ('bomb.pth', 'bare.pth'):
        with pytest.raises(CheckpointError, match='wants to run code'): load_published(tmp_path/name)
    assert not os.path.exists(trap)


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'state_dict': s}, lambda s: {'model': s, 'epoch': 3},
                                  lambda s: {'state_dict': {f'module.{k}': v for k, v in s.items()}, 'optimizer': {}}])
def test_published_wrappings(tmp_path, wrap):
    net = Net(); torch.save(wrap(net.state_dict()), tmp_path/'weights.pth')
    assert same(load_weights(Net(), load_published(tmp_path/'weights.pth')), net)


def test_bad_published_files(tmp_path):
    torch.save([1, 2], tmp_path/'list.pth'); (tmp_path/'empty.pth').write_bytes(b''); (tmp_path/'text.pth').write_text('hello')
    with pytest.raises(CheckpointError, match='expected a dict of tensors'): load_published(tmp_path/'list.pth')
    for name in ('empty.pth', 'text.pth', 'missing.pth'):
        with pytest.raises(CheckpointError, match=name): load_published(tmp_path/name)


def test_another_architecture_is_refused(tmp_path):
    save_model(tmp_path/'net', Net(8), {})
    with pytest.raises(CheckpointError, match=r'another architecture than Net.*shapes differ \(layers.0.bias \(8,\) for \(4,\)'):
        load_weights(Net(4), load_published(tmp_path/'net/model.safetensors'))
    from talkingface.experts.syncnet import build_expert
    with pytest.raises(CheckpointError, match="holds {'name': 'net', 'width': 8}, which build_expert cannot build"):
        load_model(tmp_path/'net', build_expert)


def test_a_loss_that_is_not_finite_stops(tmp_path):
    with pytest.raises(TalkingFaceError, match='not finite at step'): train(tmp_path/'nan', lr=1e30)


def test_plateau_warning_names_causes_and_stays_silent_otherwise(tmp_path):
    def warning(lr, out):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            flat = PlateauWarning({1e9: 'nothing at all', .0001: 'every pair gets the same answer (ln 2)'}, 'The learning rate is too high.', after=10)
            train(out, lr=lr, callbacks=(flat,))
        return [str(w.message) for w in caught if 'no better than' in str(w.message)]
    [text] = warning(1e-9, tmp_path/'a')
    assert 'ln 2' in text and 'learning rate' in text


def test_early_stop_counts_on_after_a_break(tmp_path):
    stop = lambda: (Validate(lambda run: {'val': float(run.step < 6)}, every=2), EarlyStop('val', patience=4))
    whole, _, _ = train(tmp_path/'whole', steps=40, callbacks=stop())
    with pytest.raises(KeyboardInterrupt): train(tmp_path/'broken', steps=40, die_before=8, every=1, callbacks=stop())
    joined, _, _ = train(tmp_path/'broken', steps=40, every=1, callbacks=stop())
    assert whole.step == joined.step == 10 and joined.started_at == 8 and 'has not improved' in joined.stop
    assert train(tmp_path/'whole', steps=40, callbacks=stop())[0].step == 10


def test_training_imports_with_torch_numpy_and_lightning_alone():
    code = textwrap.dedent("""
        import sys
        for name in ('cv2', 'av', 'pandas', 'librosa', 'skimage', 'scipy', 'espeakng_loader', 'face_alignment', 'pyarrow'):
            sys.modules[name] = None
        import talkingface.training.loop, talkingface.training.experts, talkingface.training.generators
        """)
    subprocess.run([sys.executable, '-c', code], check=True)


def test_two_processes(tmp_path):
    "Two CPU processes under torchrun: each takes every second batch, the weights agree, and a broken run resumes bit for bit."
    script = tmp_path/'run.py'
    script.write_text(textwrap.dedent(f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch, test_training as t
        fabric = t.make_fabric(threads=1)
        assert fabric.world_size == 2
        t.make_fabric = lambda **_: fabric
        try: t.train({str(tmp_path/'broken')!r}, die_before=12)
        except KeyboardInterrupt: pass
        _, whole, _ = t.train({str(tmp_path/'whole')!r})
        run, joined, _ = t.train({str(tmp_path/'broken')!r})
        assert run.started_at == 10 and t.same(whole, joined)
        weights = torch.cat([p.flatten() for p in joined.parameters()])
        assert (fabric.all_gather(weights) == weights).all()
        """))
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)],
                   check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=120)
    [folder] = checkpoints(tmp_path/'broken')
    assert json.loads((folder/'meta.json').read_text())['processes'] == 2
    with pytest.raises(CheckpointError, match='written by 2 processes, this run has 1'): train(tmp_path/'broken')
