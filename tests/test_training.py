"Training: resume bit for bit, kills, foreign and dangerous checkpoints, plateaus, imports."
import io
import json
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import textwrap
import warnings
from contextlib import contextmanager, redirect_stderr
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from talkingface.core import CheckpointError, InputError, ParamsError, TalkingFaceError
from talkingface.experts.checkpoints import build_expert
from talkingface.generators.base import GENERATORS, Generator, build_generator
from talkingface.data.clips import SyncBatches
from talkingface.training.experts import (Augmentation, ExpertParams, SyncObjective, bce_step, infonce, infonce_step, parted,
                                          phase_schedule, phase_warnings, prepared, train_expert)
from talkingface.generators.references import Silencer
from talkingface.losses.adversarial import held
from talkingface.losses.objective import LOSSES
from talkingface.losses.reconstruction import LossTerm
from talkingface.training import generators, loop
from talkingface.training.generators import GeneratorBatches, GeneratorParams, GeneratorTraining, Row, build_terms, train_generator
from talkingface.training.loop import (Callback, EarlyStop, PlateauWarning, Validate, checkpoints, finish_run, fit, make_fabric,
                                       warmup_cosine)
from talkingface.weights import load_model, load_published, load_weights, save_model

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


@contextmanager
def full_disk(size=None):
    "No file may grow beyond `size` bytes: writes fail in the middle, as on a full disk. `fill_up` sets the size later."
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    def fill_up(size): resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))
    try:
        with redirect_stderr(io.StringIO()):      # the progress bar must not meet the limit
            if size is not None: fill_up(size)
            yield fill_up
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, kept)


class FillUp(Callback):
    "At step `at` the disk has room for `more` bytes behind log.csv, or for files of `size` bytes."
    def __init__(self, fill_up, at, more=None, size=None): self.fill_up, self.at, self.more, self.size = fill_up, at, more, size
    def on_step(self, run):
        if run.step == self.at: self.fill_up(self.size or (run.out/'log.csv').stat().st_size + self.more)


def toy_clip(number, split='train', frames=40):
    "A face whose mouth opens with the loudness of its sound."
    draw = np.random.default_rng(number); level = draw.uniform(size=frames); mouth = np.round(4 + 14*level).astype(int)
    faces = np.full((frames, 3, 96, 96), 120 + number, np.uint8)
    for t, m in enumerate(mouth): faces[t, :, 72 - m//2:72 + m - m//2, 34:62] = 20
    mel = np.interp(np.arange(frames*16//5 + 1)/3.2, np.arange(frames) + .5, level*6 - 3)[None].repeat(80, 0).astype(np.float32)
    wav = (draw.normal(size=frames*640)*np.repeat(.01 + .2*level, 640)).astype(np.float32)
    return SimpleNamespace(name=f'toy_{number}', split=split, faces=faces, mel=mel, wav=wav, frames=frames,
                           landmarks=np.zeros((frames, 68, 2), np.float32), valid=np.ones(frames, bool))


class ToyStore(list):
    "What training reads of a clip store."
    root, size = 'toys', 96
    def split(self, name): return ToyStore(c for c in self if c.split == name)
    @property
    def rows(self): return [dict(clip=c.name, split=c.split, identity=c.name, frames=c.frames) for c in self]


@pytest.fixture(scope='module')
def toys(): return ToyStore([*map(toy_clip, range(6)), toy_clip(9, 'val')])


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


@pytest.mark.parametrize('at, room, file, kept', [
    (5, dict(size=900), 'step_00000005', 0),      # the first checkpoint
    (10, dict(size=900), 'step_00000010', 5),     # a later one: safetensors fails
    (15, dict(size=12_000), 'step_00000015', 10), # the last of its files fails
    (12, dict(more=1), 'log.csv', 10),            # '1' of the row '12,...' is written
    (3, dict(size=5), 'log.csv', 0)])             # the log itself
def test_a_full_disk_loses_nothing(tmp_path, at, room, file, kept):
    with full_disk() as fill_up, pytest.raises(CheckpointError) as error:
        train(tmp_path/'run', callbacks=(FillUp(fill_up, at, **room),))
    text = str(error.value)
    assert f'stopped at step {at} of 20: ' in text and f'{file} could not be written' in text
    assert f'run the same command again: it goes on from step {kept}' in text
    assert [p.name for p in checkpoints(tmp_path/'run')] == ([f'step_{kept:08d}'] if kept else [])
    assert not list((tmp_path/'run').rglob('*.part*'))
    run, net, _ = train(tmp_path/'run'); _, whole, _ = train(tmp_path/'whole')
    assert run.started_at == kept and same(net, whole)
    assert (tmp_path/'whole/log.csv').read_bytes() == (tmp_path/'run/log.csv').read_bytes()


def test_a_full_disk_at_the_start_and_at_the_end(tmp_path):
    with full_disk(3), pytest.raises(CheckpointError, match='step 0 of 20.*log.csv could not be written.*from step 0'):
        train(tmp_path/'run')
    run, net, _ = train(tmp_path/'run')
    with full_disk(900), pytest.raises(CheckpointError, match='step 20 of 20.*model.safetensors could not.*from step 20'):
        finish_run(run, net.module, {})
    again, net, losses = train(tmp_path/'run')
    assert losses == [] and again.step == 20 and not again.finished
    finish_run(again, net.module, {})
    assert same(load_model(tmp_path/'run', build), train(tmp_path/'whole')[1].module)


@pytest.mark.parametrize('device, near', [('cuda:0', 'cuda'), ('gpu', 'cuda'), ('CPU', 'cpu'), ('atuo', 'auto')])
def test_an_unknown_device_is_refused(device, near):
    with pytest.raises(ParamsError, match=f"expected 'cpu', 'cuda' or 'auto', got '{device}'; did you mean '{near}'"):
        make_fabric(device)


def interrupted(monkeypatch, owner, method, number, *deaths):
    "A call of `owner.method` that dies once before each step of `deaths`; `number` is the argument that holds the step."
    call, left = getattr(owner, method), list(deaths)
    def dying(self, *args):
        if left and args[number] == left[0]: left.pop(0); raise KeyboardInterrupt
        return call(self, *args)
    monkeypatch.setattr(owner, method, dying)
    return left


def run_to_end(train, deaths):
    "Start again after every interruption, with other global random states each time."
    while deaths:
        with pytest.raises(KeyboardInterrupt): train()
        random.seed(99); np.random.seed(99); torch.manual_seed(99)
    return train()


def assert_same_run(a, b):
    for name in ('model.safetensors', 'log.csv'): assert (a/name).read_bytes() == (b/name).read_bytes(), name


@pytest.mark.parametrize('loss, accumulate', [('infonce', 1), ('bce', 1), ('infonce+bce', 1), ('infonce+bce', 4)])
def test_expert_resumes_bit_for_bit(tmp_path, toys, monkeypatch, loss, accumulate):
    "Broken at two places; the second run goes on from step 6, where the phase changes."
    net = {'name': 'light_syncnet', 'width': 8, 'dim': 16, 'relu': 'bce' in loss}
    params = lambda every: ExpertParams(net=net, loss=loss, steps=10, bce_steps=4 * ('+' in loss), batch=16, per_clip=4, warmup=3,
                                        plateau_after=8, log_every=2, checkpoint_every=every, accumulate=accumulate,
                                        augmentation=Augmentation(rotation=5., colour=.1, gain=6.))
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'after 8 steps')
        metrics = train_expert(toys, params(200), tmp_path/'whole')
        deaths = interrupted(monkeypatch, SyncObjective, 'forward', 1, 5, 8)
        assert run_to_end(lambda: train_expert(toys, params(3), tmp_path/'broken'), deaths) == metrics
    assert_same_run(tmp_path/'whole', tmp_path/'broken')


def objective_and_batch(loss='infonce', seed=0, **options):
    "A small net, its settings and a prepared batch of 16 toy windows."
    params = ExpertParams(net={'name': 'light_syncnet', 'width': 8, 'dim': 16, 'relu': True}, loss=loss, batch=16, per_clip=4, **options)
    torch.manual_seed(seed)
    batch = SyncBatches(ToyStore(map(toy_clip, range(6))), batch=16, per_clip=4)[0]
    return SyncObjective(build_expert(params.net), params), params, prepared(batch, params, 0)


def expert_gradient(fabric, model, batch, parts, step=infonce_step):
    model.zero_grad(); logs = step(fabric, model, parted(batch, parts), 0)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]), logs['loss'].item()


@pytest.mark.parametrize('loss, step', [('infonce', infonce_step), ('bce', bce_step)])
@pytest.mark.parametrize('parts', [2, 4])
def test_accumulated_gradient_is_that_of_the_batch(loss, step, parts):
    fabric = make_fabric(threads=1); objective, _, batch = objective_and_batch(loss); objective.double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    model = fabric.setup_module(objective)
    (whole, a), (in_parts, b) = expert_gradient(fabric, model, batch, 1, step), expert_gradient(fabric, model, batch, parts, step)
    assert a == pytest.approx(b, rel=1e-6) and (whole - in_parts).abs().max() < 1e-5 * whole.abs().max()


def test_accumulation_is_plain_infonce_and_counts_each_part_once():
    "The gradient is autograd's own; batch norm counts a part once although it is computed twice."
    fabric = make_fabric(threads=1); objective, params, batch = objective_and_batch(); objective.eval()
    model = fabric.setup_module(objective); found, _ = expert_gradient(fabric, model, batch, 4)
    objective.zero_grad(); infonce(*objective(batch, 0))['loss'].backward()
    direct = torch.cat([p.grad.flatten() for p in objective.parameters()])
    assert (found - direct).abs().max() < 1e-4 * direct.abs().max()
    objective.train(); expert_gradient(fabric, model, batch, 4)
    counts = {int(b) for name, b in objective.named_buffers() if name.endswith('num_batches_tracked')}
    assert counts == {4}


def test_each_phase_has_its_plateau_and_its_rates():
    params = ExpertParams(net={'name': 'syncnet', 'width': .125}, loss='infonce+bce', steps=400, bce_steps=100, warmup=10, plateau_after=80)
    first, second = phase_warnings(params, processes=2)
    assert first.after == 80 and list(first.levels) == [pytest.approx(np.log(128))]
    assert second.after == 380 and list(second.levels) == [pytest.approx(np.log(2))]
    factor = phase_schedule(params)
    assert factor(299, 400) < .03 and factor(300, 400) == .1 and factor(310, 400) == 1. and factor(399, 400) < .03
    with pytest.raises(ParamsError, match='set net.relu: true'):
        SyncObjective(build_expert({'name': 'light_syncnet', 'width': 8}), params)


@pytest.mark.parametrize('ema', [0., .9])
def test_generator_resumes_bit_for_bit(tmp_path, toys, monkeypatch, ema):
    "Broken three times, with a discriminator and, in turn, averaged weights."
    row = Row({'name': 'light', 'width': 8}, {'pixel': 1., 'sync': .1, 'adversarial': .05},
              options={'adversarial': {'width': .125}})
    torch.manual_seed(0); expert = build_expert({'name': 'light_syncnet', 'width': 8, 'dim': 16})
    params = lambda every: GeneratorParams(steps=10, batch=2, warmup=2, ema=ema, validate_clips=1,
                                           log_every=1, checkpoint_every=every)
    metrics = train_generator(toys, row, params(200), tmp_path/'whole', expert)
    deaths = interrupted(monkeypatch, GeneratorTraining, 'step', 0, 4, 8)
    assert run_to_end(lambda: train_generator(toys, row, params(3), tmp_path/'broken', expert), deaths) == metrics
    assert_same_run(tmp_path/'whole', tmp_path/'broken')
    fresh = torch.cat([p.flatten() for p in build_generator(row.generator).parameters()])
    assert not torch.equal(fresh, torch.cat([p.flatten() for p in load_model(tmp_path/'whole', build_generator).parameters()]))


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
    with pytest.raises(CheckpointError, match="holds {'name': 'net', 'width': 8}, which build_expert cannot build"):
        load_model(tmp_path/'net', build_expert)


def test_a_loss_that_is_not_finite_stops(tmp_path):
    with pytest.raises(TalkingFaceError, match='not finite at step'): train(tmp_path/'nan', lr=1e30)


def plateau_warnings(run):
    "What the plateau warning says during `run()`."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always'); run()
    return [str(w.message) for w in caught if 'no better than' in str(w.message)]


def test_plateau_warning_names_the_level_and_the_causes(tmp_path):
    levels = {1e9: 'nothing at all is known', 1e-4: 'every pair gets the same answer'}
    flat = lambda levels: PlateauWarning(levels, 'The learning rate is too high.', after=10)
    [text] = plateau_warnings(lambda: train(tmp_path/'a', callbacks=(flat(levels),)))
    assert 'every pair' in text and 'nothing at all' not in text and 'learning rate' in text
    assert plateau_warnings(lambda: train(tmp_path/'b', callbacks=(flat({1e9: 'nothing at all is known'}),))) == []


def test_plateau_warning_stays_silent_when_an_expert_learns(tmp_path, toys):
    "The same expert, data and steps: one learning rate is useless, the other is not."
    def run(lr):
        params = ExpertParams(net={'name': 'light_syncnet', 'width': 8, 'dim': 32}, steps=80, batch=16, per_clip=4, warmup=5,
                              lr=lr, plateau_after=80)
        return plateau_warnings(lambda: train_expert(toys, params, tmp_path/f'{lr}'))
    [text] = run(1e-9)
    assert 'ln 16' in text and 'learning rate that is too high' in text
    assert run(3e-3) == []


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


def test_negatives_of_all_processes(tmp_path):
    "Two processes with half of a batch each have the InfoNCE gradient of the whole batch, also in parts."
    script = tmp_path/'run.py'
    script.write_text(textwrap.dedent(f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        import torch, test_training as t
        fabric = t.make_fabric(threads=1)
        objective, params, batch = t.objective_and_batch(); objective.eval()
        alone = t.infonce(*objective(batch, 0))['loss']; alone.backward()
        whole = torch.cat([p.grad.flatten() for p in objective.parameters()])
        model = fabric.setup_module(objective); half = t.parted(batch, 2)[fabric.global_rank]
        for parts in (1, 4):
            found, loss = t.expert_gradient(fabric, model, half, parts)
            assert abs(loss - alone.item()) < 1e-5 and (found - whole).abs().max() < 1e-4 * whole.abs().max(), parts
        both = t.ExpertParams(net=params.net, loss='infonce+bce', steps=4, bce_steps=2, batch=8, per_clip=4, accumulate=2, warmup=1)
        t.train_expert(t.ToyStore(map(t.toy_clip, range(6))), both, {str(tmp_path/'run')!r}, fabric)
        """))
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(script)],
                   check=True, env={**os.environ, 'OMP_NUM_THREADS': '1'}, timeout=120)
    assert json.loads((tmp_path/'run/meta.json').read_text())['processes'] == 2


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


def test_rows_see_the_same_windows(toys):
    "What is compared must have been shown the same frames and sounds; only the reference may differ, and a closed one is the same frame."
    make = lambda **how: GeneratorBatches(toys.split('train'), Row({'name': 'light'}, {'pixel': 1.}, **how), GeneratorParams(batch=2, seed=3))
    one, other = make(), make(reference='closed')
    for step in (0, 5):
        a, b = one[step], other[step]
        for field in ('faces', 'mel', 'mel_window', 'clip', 'start'): assert torch.equal(a[field], b[field])
    assert torch.equal(one[4]['reference'], make(silence='silent')[4]['reference'])


def test_the_start_and_the_silencer_stay_as_they_are(tmp_path, toys):
    start = build_generator({'name': 'light', 'width': 8}); silencer = Silencer(build_generator({'name': 'light', 'width': 8}))
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in (start, silencer.generator)]
    row = Row({'name': 'light', 'width': 8}, {'pixel': 1., 'adaptive_triplet': .5}, silence='silent')
    train_generator(toys, row, GeneratorParams(steps=3, batch=2, validate_clips=1), tmp_path/'run', start=start, silencer=silencer)
    for net, kept in zip((start, silencer.generator), before): assert all(torch.equal(v, kept[k]) for k, v in net.state_dict().items())
    log = pd.read_csv(tmp_path/'run'/'log.csv')
    assert np.isfinite(log.to_numpy()).all() and (log['grad_generator'] > 0).all()


def test_a_frozen_audio_encoder_is_that_of_its_expert(tmp_path, toys):
    expert = build_expert({'name': 'syncnet', 'width': .125}).eval()
    row = Row({'name': 'light', 'width': 8, 'audio': expert.config}, {'pixel': 1.})
    train_generator(toys, row, GeneratorParams(steps=2, batch=2, validate_clips=1), tmp_path/'run', audio=expert)
    made = load_model(tmp_path/'run', build_generator); mel = torch.randn(3, 1, 80, 16)
    with torch.no_grad(): assert torch.allclose(made.audio_encoder(mel), expert.encode_mel(mel), atol=1e-6)


class Hearing:
    "Stands for Wav2Vec2: loudness of each 20 ms, repeated over 768 channels."
    def __init__(self, *_, **__): pass
    def features(self, wav): return np.abs(wav[:len(wav)//320*320]).reshape(-1, 320).mean(1, dtype=np.float32)[:, None].repeat(768, 1)


def test_a_row_that_hears_speech_features_is_trained_and_re_voiced(tmp_path, monkeypatch):
    "Setup C from its warm-up to its faces, with a stand-in for the published network."
    import talkingface.dubbing as dubbing
    for module in (dubbing, generators): monkeypatch.setattr(module, 'Wav2Vec2Speech', Hearing)
    clips = ToyStore([*map(toy_clip, range(3)), toy_clip(9, 'val')])
    block = dict(net={'name': 'light', 'width': 8}, seeds=2, warm_up=dict(steps=2, batch=2, frames=1, validate_clips=1), train=dict(steps=2, batch=2, validate_clips=1))
    folders = generators.Folders(warm_ups=tmp_path/'warm_ups')
    generators.train_row(clips, dict(training='warm_up', audio='wav2vec2', losses={'pixel': 1.}), block, tmp_path/'warm_ups'/'wav2vec2', folders)
    generators.train_row(clips, dict(start='wav2vec2', losses={'pixel': 1.}), block, tmp_path/'row', folders)
    assert dubbing.revoice_row('row', tmp_path/'row', clips.split('val'), tmp_path/'faces') == ''
    assert sorted(p.relative_to(tmp_path/'faces').as_posix() for p in (tmp_path/'faces').rglob('*.safetensors')) == ['seed-1/toy_9.safetensors', 'toy_9.safetensors']
    once = block | dict(seeds=1)
    generators.train_row(clips, dict(start='wav2vec2', losses={'pixel': 1.}), once, tmp_path/'row', folders)
    assert not (tmp_path/'row'/'seed-1').exists()


# ---- terms that learn, stills, and what a block may say ------------------------------------------------------------------
class Critics(LossTerm):
    "Two discriminators in one module."
    name = 'critics'
    def __init__(self, width: int = 4):
        self.discriminator = nn.ModuleDict({n: nn.Conv2d(3, width, 8, 8) for n in ('frames', 'pairs')})
    def score(self, x): return sum(net(x.flatten(0, 1)).mean() for net in self.discriminator.values())
    def __call__(self, output, batch):
        with held(self.discriminator): return (self.score(output) - 1).square()
    def discriminator_loss(self, real, fake): return (self.score(real.detach()) - 1).square() + self.score(fake.detach()).square()


class Tempered(LossTerm):
    "Compares what the generator keeps in `inner` with the brightness of the target, at a temperature that learns."
    name, needs = 'tempered', ('target',)
    def __init__(self, generator): self.generator, self.learnable = generator, nn.Linear(1, 1)
    def __call__(self, output, batch): return (self.learnable(self.generator.inner['level']) - batch.target.mean((1, 2, 3, 4))[:, None]).square().mean()


class Album(Generator):
    "Pastes the mean of its stills below the pose."
    needs = ('masked', 'stills', 'still_landmarks')
    def __init__(self, size: int = 96, count: int = 3, side: bool = False):
        super().__init__('album', size=size, count=count, side=side)
        self.gain = nn.Parameter(torch.full((3, 1, 1), .5)); self.side = nn.Linear(1, 1) if side else None
    @property
    def stills(self): return self.config['count']
    def draw(self, batch):
        self.inner = {'level': batch.still_landmarks.mean((1, 2, 3))[:, None] + self.gain.mean()}
        lower = (torch.arange(self.size) >= self.size//2).float().view(-1, 1)
        return (batch.masked + lower*batch.stills.mean(1, keepdim=True)*self.gain).clamp(0, 1)


@pytest.fixture
def album(monkeypatch):
    monkeypatch.setitem(GENERATORS, 'album', Album)
    for term in (Critics, Tempered): monkeypatch.setitem(LOSSES, term.name, term)


def test_terms_with_discriminators_and_learnable_parts_resume_bit_for_bit(tmp_path, toys, monkeypatch, album):
    "A generator with stills, a term with two discriminators that begins late, and one with parameters of its own."
    row = Row({'name': 'album'}, {'pixel': 1., 'critics': .1, 'tempered': .1}, since={'critics': 2})
    params = lambda every: GeneratorParams(steps=8, batch=2, warmup=2, validate_clips=1, log_every=1, checkpoint_every=every)
    metrics = train_generator(toys, row, params(200), tmp_path/'whole')
    deaths = interrupted(monkeypatch, GeneratorTraining, 'step', 0, 1, 4)
    assert run_to_end(lambda: train_generator(toys, row, params(3), tmp_path/'broken'), deaths) == metrics
    assert_same_run(tmp_path/'whole', tmp_path/'broken')
    log = pd.read_csv(tmp_path/'whole'/'log.csv')
    assert log['weight_critics'].tolist() == [0, 0] + [.1]*6 and log['grad_discriminator_critics'].notna().tolist() == [False]*2 + [True]*6


def test_what_learns_in_a_term_is_trained_and_kept_in_checkpoints(tmp_path, toys, album):
    fabric = make_fabric(threads=1); row = Row({'name': 'album'}, {'tempered': 1.}); params = GeneratorParams(steps=4, batch=2)
    generator = build_generator(row.generator); training = GeneratorTraining(fabric, generator, row, params)
    assert training.terms['tempered'].generator is generator
    term, batches = training.terms['tempered'].learnable, GeneratorBatches(toys.split('train'), row, params, stills=3)
    before = term.weight.detach().clone(); training.step(0, batches[0])
    assert not torch.equal(before, term.weight) and training.modules['term_tempered'] is term
    assert {id(p) for g in training.optimizers['generator'].param_groups for p in g['params']} >= {id(p) for p in term.parameters()}
    with pytest.raises(InputError, match="loss 'tempered' needs the generator that is trained; pass generator="): build_terms(row)


def test_a_checkpoint_tells_the_weights_of_its_last_step(tmp_path, toys, monkeypatch):
    "Not those that the row will have in the end."
    row = Row({'name': 'light', 'width': 8}, {'pixel': 1., 'adversarial': .1}, since={'adversarial': 3}, options={'adversarial': {'width': .125}})
    params, kept = GeneratorParams(steps=5, batch=2, validate_clips=1, log_every=1, checkpoint_every=1), {}
    write = loop.write_json
    monkeypatch.setattr(loop, 'write_json', lambda path, value: (kept.__setitem__(value['step'], value['weights']) if 'weights' in value else None, write(path, value)))
    train_generator(toys, row, params, tmp_path/'run')
    assert [kept[k]['adversarial'] for k in (1, 2, 3, 4, 5)] == [0, 0, 0, .1, .1] and json.loads((tmp_path/'run/meta.json').read_text())['weights']['adversarial'] == .1
    assert pd.read_csv(tmp_path/'run'/'log.csv')['weight_adversarial'].tolist() == [0, 0, 0, .1, .1]


def test_the_discriminator_waits_for_its_term(toys):
    "Until its step it stays as it was made."
    fabric = make_fabric(threads=1); params = GeneratorParams(steps=5, batch=2)
    row = Row({'name': 'light', 'width': 8}, {'pixel': 1., 'adversarial': .1}, since={'adversarial': 1}, options={'adversarial': {'width': .125}})
    training = GeneratorTraining(fabric, build_generator(row.generator), row, params); batches = GeneratorBatches(toys.split('train'), row, params)
    weights = lambda: torch.cat([p.detach().flatten().clone() for p in training.modules['discriminator'].parameters()])
    before = weights(); assert 'discriminator' not in training.step(0, batches[0]) and torch.equal(before, weights())
    assert float(training.step(1, batches[1])['grad_discriminator']) > 0 and not torch.equal(before, weights())


@pytest.mark.parametrize('since, message', [({'pixel': 0, 'sync': 10}, 'row.since.sync: expected a step of a training of 10 steps, 0 to 9, got 10'),
                                            ({'sync': -1}, 'row.since.sync: expected a step of the training, 0 or later, got -1')])
def test_a_step_that_never_comes_is_refused(tmp_path, toys, since, message):
    expert = build_expert({'name': 'light_syncnet', 'width': 8, 'dim': 16}); made = lambda: Row({'name': 'light', 'width': 8}, {'pixel': 1., 'sync': .1}, since=since)
    with pytest.raises(ParamsError, match=message): train_generator(toys, made(), GeneratorParams(steps=10), tmp_path/'run', expert)
    block = dict(net={'name': 'light', 'width': 8}, train=dict(steps=10))
    with pytest.raises(ParamsError, match=message): generators.row_settings(dict(losses={'pixel': 1., 'sync': .1}, since=since), block, {})


def test_stills_go_with_training_and_validation(tmp_path, toys, album):
    row = Row({'name': 'album', 'count': 2}, {'pixel': 1.}); params = GeneratorParams(steps=2, batch=2, validate_clips=1, log_every=1)
    metrics = train_generator(toys, row, params, tmp_path/'run')
    again = load_model(tmp_path/'run', build_generator); assert again.stills == 2
    assert generators.generator_quality(again, toys.split('val'))['l1_lower'] == pytest.approx(metrics['val']['l1_lower'], abs=1e-6)
    with pytest.raises(InputError, match='leave the silencer out'):
        train_generator(toys, Row({'name': 'album'}, {'pixel': 1.}, silence='silent'), params, tmp_path/'no', silencer=Silencer(build_generator({'name': 'light', 'width': 8})))


def test_a_row_changes_its_network_and_keeps_the_weights_of_its_warm_up(tmp_path, toys, album):
    "Ablations are parameters of one class: a part may be switched off, not invented."
    block = dict(net={'name': 'light', 'width': 8}, train=dict(steps=1, batch=2, validate_clips=1),
                 album_warm_up=dict(net={'name': 'album', 'side': True}, steps=1, batch=2, validate_clips=1), album=dict(steps=1, batch=2, lr=1e-9, validate_clips=1))
    folders, losses = generators.Folders(warm_ups=tmp_path/'warm_ups'), {'losses': {'pixel': 1.}}
    generators.train_row(toys, dict(training='album_warm_up', **losses), block, tmp_path/'warm_ups'/'album', folders)
    generators.train_row(toys, dict(training='album', start='album', net={'side': False}, **losses), block, tmp_path/'row', folders)
    start, row = (load_model(tmp_path/p, build_generator) for p in ('warm_ups/album', 'row'))
    assert row.config == start.config | {'side': False} and start.config['side'] and torch.allclose(row.gain, start.gain, atol=1e-6)
    generators.train_row(toys, dict(training='album_warm_up', net={'side': False}, **losses), block, tmp_path/'warm_ups'/'plain', folders)
    with pytest.raises(InputError, match='differs from its start in side: False there, True now, and the start has no weights for side'):
        generators.train_row(toys, dict(training='album', start='plain', net={'side': True}, **losses), block, tmp_path/'no', folders)
    with pytest.raises(ParamsError, match="did you mean 'side'"):
        generators.train_row(toys, dict(training='album_warm_up', net={'sid': False}, **losses), block, tmp_path/'no', folders)


@pytest.mark.parametrize('change, message', [
    ({'seeds': 0}, 'generator.seeds: expected at least 1 training, got 0'), ({'seeds_of': {'row': 0}}, 'generator.seeds_of.row: expected at least 1 training, got 0'),
    ({'seedz': 2}, "did you mean 'seeds'"), ({'tain': {'setps': 3}}, "generator.tain: unknown key 'setps', did you mean 'steps'"),
    ({'mine': {'steps': 3}, 'train': {'stps': 3}}, "generator.train: unknown key 'stps'")])
def test_a_wrong_block_is_refused_and_nothing_is_removed(tmp_path, toys, change, message):
    (tmp_path/'row').mkdir(); (tmp_path/'row'/'kept').touch(); block = dict(net={'name': 'light', 'width': 8}, train=dict(steps=1)) | change
    with pytest.raises(ParamsError, match=message): generators.train_row(toys, dict(losses={'pixel': 1.}), block, tmp_path/'row', generators.Folders(), name='row')
    with pytest.raises(ParamsError, match=message): generators.row_settings(dict(losses={'pixel': 1.}), block, {})
    assert (tmp_path/'row'/'kept').exists()


def test_a_kind_of_training_is_any_block_of_settings():
    block = dict(net={'name': 'light'}, train=dict(steps=3), g4g=dict(steps=5, net={'name': 'light', 'width': 16}))
    what, params = generators.row_settings(dict(training='g4g', losses={'pixel': 1.}), block, {}); assert params.steps == 5 and what.generator['width'] == 16
    with pytest.raises(ParamsError, match="row.training: unknown key 'gg', did you mean 'g4g'"): generators.row_settings(dict(training='gg', losses={'pixel': 1.}), block, {})


def test_a_missing_training_of_a_start_is_named(tmp_path, toys):
    "Too few, or enough but one that did not finish."
    block = dict(net={'name': 'light', 'width': 8}, seeds=3, train=dict(steps=1, batch=2, validate_clips=1), warm_up=dict(steps=1, batch=2, frames=1, validate_clips=1))
    folders, row = generators.Folders(warm_ups=tmp_path), dict(start='joint', losses={'pixel': 1.})
    with pytest.raises(InputError, match="training 0 of 'joint', .* finished are none"): generators.row_parts(row, folders)
    generators.train_row(toys, dict(training='warm_up', losses={'pixel': 1.}), block, tmp_path/'joint', folders)
    with pytest.raises(InputError, match="training 3 of 'joint', .*seed-3 holds no finished one; finished are 0, 1, 2. Train 'joint' again"): generators.row_parts(row, folders, 3)
    (tmp_path/'joint'/'seed-1'/'model.safetensors').unlink()
    with pytest.raises(InputError, match="training 1 of 'joint', .*seed-1 holds no finished one; finished are 0, 2"): generators.row_parts(row, folders, 1)
    assert generators.row_parts(row, folders, 2).keys() == {'start'}


def test_what_a_generator_goes_on_from_is_on_record(tmp_path, toys):
    "An expert behind the warm-up or the silencer is an ancestor of the row: it may not score it."
    expert = build_expert({'name': 'syncnet', 'width': .125}).eval(); expert.meta = {'weights_sha256': 'a'*64}
    row = Row({'name': 'light', 'width': 8, 'audio': expert.config}, {'pixel': 1.}); params = GeneratorParams(steps=1, batch=2, validate_clips=1)
    train_generator(toys, row, params, tmp_path/'warm_up', audio=expert)
    start = load_model(tmp_path/'warm_up', build_generator)
    train_generator(toys, Row(start.config, {'pixel': 1.}, start='warm_up'), params, tmp_path/'row', start=start)
    assert 'a'*64 in json.loads((tmp_path/'row'/'meta.json').read_text())['run']['ancestors']
    with pytest.raises(Exception, match='row.silence names'): train_generator(toys, Row(start.config, {'pixel': 1.}, silence='silent'), params, tmp_path/'no', start=start)


def test_an_expert_of_the_same_pretraining_may_not_score(tmp_path, toys):
    "What an expert was fine-tuned from is on record behind the warm-up and the row; a sister of the expert is refused, a stranger is not."
    from talkingface.metrics.sync import SyncScorer, check_independent
    def expert(own, origin):
        made = build_expert({'name': 'syncnet', 'width': .125}).eval(); made.meta = {'weights_sha256': own*64, 'run': {'from': origin*64} if origin else {}}
        return made
    params = GeneratorParams(steps=1, batch=2, validate_clips=1); trainer = expert('a', 'f')
    train_generator(toys, Row({'name': 'light', 'width': 8}, {'pixel': 1., 'sync': .1}), params, tmp_path/'warm_up', trainer)
    start = load_model(tmp_path/'warm_up', build_generator)
    train_generator(toys, Row(start.config, {'pixel': 1.}, start='warm_up'), params, tmp_path/'row', start=start)
    for name in ('warm_up', 'row'):
        meta = json.loads((tmp_path/name/'meta.json').read_text()); assert 'f'*64 in meta['run']['ancestors']
        for own, origin in (('b', 'f'), ('f', '')):              # a sister, and what both come from
            with pytest.raises(InputError, match='fine-tuned from|trained this generator'): check_independent(SyncScorer(expert(own, origin), 'x', own*64), meta)
        for own, origin in (('b', 'e'), ('b', '')): check_independent(SyncScorer(expert(own, origin), 'x', own*64), meta)
    old = {'run': {'expert': 'a'*64, 'ancestors': []}}           # of before that entry: the expert alone is known
    check_independent(SyncScorer(expert('b', 'f'), 'x', 'b'*64), old)
    with pytest.raises(InputError, match='trained this generator'): check_independent(SyncScorer(trainer, 'x', 'a'*64), old)
