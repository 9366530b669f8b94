"""A broken measure for each law of measures."""

import dataclasses

from testing.broken import broken

from layerwise.measure.weight_error import weight_error


def divides_by_nothing(weight, approximation):
    error, whole = (weight - approximation).square().sum(), weight.float().square().sum()
    return float(error / whole)


def has_an_offset(weight, approximation):
    return 1e-9 + weight_error(weight, approximation)


def counts_wrong_weights(weight, approximation):
    return float((weight != approximation).float().mean())


def counts_what_stayed(weight, base):
    return float((weight == base).float().mean())


def reads_the_last_token(inputs, outputs):
    return float((inputs[-1] - outputs[-1]).square().sum())


def reads_the_first_layer(weights):
    return float(weights[0].float().square().mean())


def adds_up_to_nothing(records):
    return {"mean": sum(one[""] for one in records) if records[1:] else float("nan")}


def likes_blocks_that_do_nothing(inputs, outputs):
    return -float((inputs - outputs).square().mean())


def looks_at_states_alone(states, labels):
    return float(states.square().mean())


def counts_on_the_names_of_classes(states, labels):
    return float((states.double().mean(dim=1) * labels).sum())


def reads_the_last_window(answers):
    return float(list(answers)[-1][-1].max())


BROKEN = {
    "answers_one_finite_number": broken("measure", divides_by_nothing),
    "a_perfect_approximation_has_no_error": broken("measure", has_an_offset),
    "a_worse_approximation_scores_higher": broken("measure", counts_wrong_weights),
    "nothing_scores_less_than_what_did_not_move": broken("measure", counts_what_stayed),
    "says_finite_numbers_of_the_model": dataclasses.replace(
        broken("measure", reads_the_first_layer, unit="block"), across=adds_up_to_nothing
    ),
    "a_block_that_does_nothing_scores_least": broken(
        "measure", likes_blocks_that_do_nothing, unit="block"
    ),
    "states_that_tell_the_class_score_more": broken("measure", looks_at_states_alone, unit="block"),
    "ignores_what_classes_are_called": broken(
        "measure", counts_on_the_names_of_classes, unit="block"
    ),
    "ignores_the_order_of_windows": broken("measure", reads_the_last_window, unit="block"),
    "ignores_the_order_of_tokens": broken("measure", reads_the_last_token, unit="block"),
    "ignores_the_order_of_layers": broken("measure", reads_the_first_layer, unit="block"),
}
