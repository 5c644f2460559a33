"Speech is exact: length to the sample, silence where it is promised, closures reached, the same bytes in any order."
import sys
from dataclasses import replace

import numpy as np
import pytest

from talkingface.core import SAMPLE_RATE, InputError, MissingExtra, rng
from talkingface.data.speech import (ACCENTS, ARTICULATION, LEXICON, REST, VISEMES, VOICES, WORDS, Phone, Voice, _parts, sentence,
                                     speech_track, synthesise, vary, visemes)

pytest.importorskip('espeakng_loader')
JAW, CLOSE, BITE = (VISEMES.index(k) for k in ('jaw', 'close', 'lip_teeth'))
BY_NAME = {voice.variant: voice for voice in VOICES}


@pytest.mark.parametrize('kind, frames, lead', [('sentences', 100, .5), ('words', 75, .5), ('word', 29, .1), ('silence', 31, .5)])
def test_length_is_exact_and_samples_lie_on_the_grid(kind, frames, lead):
    speech = speech_track(kind, frames, BY_NAME['m1'], seed=3, lead=lead)
    assert speech.wav.shape == (640 * frames,) and speech.wav.dtype == np.float32
    assert np.all(speech.wav * 2 ** 11 == np.round(speech.wav * 2 ** 11)) and np.abs(speech.wav).max() < 1
    assert bool(speech.text) == bool(speech.phones) == (kind != 'silence')


@pytest.mark.parametrize('variant', ['f2', 'Alicia', 'Mike', 'klatt', 'Lee'])
def test_lead_in_and_lead_out_are_silent(variant):
    speech = speech_track('sentences', 100, vary(BY_NAME[variant], 1), seed=7, floor=0)
    lead = speech.wav[:SAMPLE_RATE // 2], speech.wav[-SAMPLE_RATE // 2:]
    assert np.abs(speech.wav).max() > .05 and max(np.abs(part).max() for part in lead) == 0
    track = visemes(speech.phones, 100)
    assert track[:8, JAW].max() < .02 and track[-8:, JAW].max() < .02


def test_same_seed_same_bytes_in_any_order():
    asks = [('Bob saw a movie.', vary(BY_NAME[v], i)) for i, v in enumerate(['f2', 'Mario', 'f5', 'm4'])]
    there = [synthesise(*ask).wav.tobytes() for ask in asks]
    back = [synthesise(*ask).wav.tobytes() for ask in reversed(asks)]
    assert there == back[::-1] and len(set(there)) == len(asks)
    first, second = (speech_track('sentences', 75, asks[0][1], seed=4) for _ in range(2))
    assert first.wav.tobytes() == second.wav.tobytes() and first.phones == second.phones
    assert first.wav.tobytes() != speech_track('sentences', 75, asks[0][1], seed=5).wav.tobytes()


@pytest.mark.parametrize('seed', range(6))
def test_every_bilabial_reaches_full_closure_and_every_labiodental_the_teeth(seed):
    speech = speech_track('sentences', 100, vary(VOICES[7 * seed], seed), seed=seed)
    track = visemes(speech.phones, 100)
    for phone in speech.phones:
        shown = slice(int(phone.start * 25), int(phone.end * 25) + 1)
        if phone.symbol[0] in 'pbm': assert track[shown, CLOSE].max() > .99, phone
        if phone.symbol[0] in 'fv': assert track[shown, BITE].max() > .5, phone
    assert any(phone.symbol[0] in 'pbm' for phone in speech.phones)


def test_voiceless_stops_begin_at_their_silent_closure():
    speech = synthesise('A puppy, apart.', replace(BY_NAME['Michael'], rate=160))
    stops = [p for p in speech.phones if p.symbol == 'p']
    assert len(stops) == 3
    loud = np.abs(speech.wav).max()
    for p in stops: assert np.abs(speech.wav[int((p.start + .006) * 16000):int((p.start + .03) * 16000)]).max() < .02 * loud


def test_open_vowels_open_the_mouth_and_short_sentences_can_be_made_to():
    assert visemes(synthesise('Father, calm arm.', BY_NAME['Mike']).phones, 50)[:, JAW].max() > .85
    small = synthesise('We see you.', BY_NAME['Mike']).phones
    assert np.isclose(visemes(small, 30, reach=.9)[:, JAW].max(), 1.4 * visemes(small, 30)[:, JAW].max())
    assert np.allclose(visemes([], 5, reach=.9), list(REST.values()))


def test_visemes_stay_in_range_and_move_smoothly():
    track = visemes(speech_track('sentences', 100, VOICES[11], seed=2).phones, 100)
    assert track.shape == (100, 8) and track.dtype == np.float32 and track.min() >= -.2 and track.max() <= 1
    assert np.abs(np.diff(track[:, JAW])).max() < .6


def test_phones_of_all_accents_are_in_the_table():
    text = 'Young thinkers loathe these rhythms; fire, beer, poor chair, church, judge, vision, little bottle, bird, house, boy.'
    for accent in ACCENTS:
        phones = synthesise(text, Voice('x', 'm1', accent)).phones
        assert all(a.end <= b.start + 1e-9 for a, b in zip(phones, phones[1:]))
        unknown = {c for p in phones for c in p.symbol} - set(''.join(ARTICULATION)) - {'ː'}
        assert not unknown, (accent, unknown)


def test_phones_are_cut_into_parts_that_cover_them():
    parts = _parts(Phone('aɪɚ', 1., 2.))
    assert [p.symbol for p in parts] == ['a', 'ɪ', 'ɚ'] and (parts[0].start, parts[-1].end) == (1., 2.)
    assert _parts(Phone('☃', 0., 1.))[0].symbol == 'ə'


def test_text_is_a_pure_function_of_the_generator():
    assert sentence(rng(2, 'a')) == sentence(rng(2, 'a')) != sentence(rng(3, 'a'))
    assert len(set(WORDS)) == len(WORDS) >= 150 and all(LEXICON.values())


def test_bad_requests_say_what_to_do():
    with pytest.raises(InputError, match='nothing to say'): synthesise('  ', VOICES[0])
    with pytest.raises(InputError, match='knows no voice'): synthesise('hello', Voice('x', 'f2', 'en-gb'))
    with pytest.raises(InputError, match='sentences, words, word, silence'): speech_track('song', 25, VOICES[0])
    with pytest.raises(InputError, match='more frames'): speech_track('word', 8, VOICES[0], lead=.1)


def test_without_the_wheel_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'espeakng_loader', None)
    with pytest.raises(MissingExtra, match=r'talkingface\[corpus\]'): synthesise('hello', VOICES[0])
