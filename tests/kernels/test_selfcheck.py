"""The self-check passes on kernels that are right and names those that are not."""

import torch

from megatron_gdn.kernels import selfcheck


def test_right_kernels_pass(capsys):
    assert selfcheck.main(["--device", "cpu", "--backend", "torch", "--quick"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(" ok") == 23 and "all within their bounds" in printed


def test_wrong_kernel_is_named(capsys, monkeypatch):
    right = selfcheck.l2norm
    monkeypatch.setattr(selfcheck, "l2norm", lambda x, **options: right(x, **options) * 1.02)
    for others in ("rule_checks", "mixer_checks", "state_space_checks"):
        monkeypatch.setattr(selfcheck, others, lambda *args, **options: iter(()))
    assert selfcheck.main(["--device", "cpu", "--backend", "torch", "--quick"]) == 1
    printed = capsys.readouterr().out
    assert "y 2.0e-02 > 1e-05; d x 2.0e-02 > 1e-05" in printed and "2 failed" in printed


def test_wrong_gradient_and_irregular_results_are_found(monkeypatch):
    check = next(check for check in selfcheck.other_checks(torch.device("cpu"), "torch", quick=True))

    def noisy(**inputs):
        inputs["weight"] = inputs["weight"].detach() + 0 * inputs["weight"]
        return {"y": check.function(**inputs)["y"] + 1e-7 * torch.randn(1)}

    changed = selfcheck.Check(**{name: getattr(check, name) for name in check.__slots__} | dict(function=noisy))
    _, same, problems = selfcheck.run_check(changed)
    assert not same and any("d weight" in problem for problem in problems) and "two runs differ" in problems


def test_sums_that_cancel_are_measured_by_what_the_kernel_adds():
    """dD of two heads is 11 and -37 there, of 33,000 products each; rounding the gradient of y alone moves it by 1."""
    checks = selfcheck.state_space_checks(torch.device("cpu"), "torch", quick=False)
    check = next(check for check in checks if (check.name, check.dtype) == ("ssd N 60 P 100", torch.bfloat16))
    assert selfcheck.run_check(check)[2] == []


def test_beta_to_2_is_checked_with_the_kernels_that_serve_it(monkeypatch):
    seen, right = [], selfcheck.chunk_gated_delta_rule

    def rule(*tokens, beta, allow_neg_eigval, **options):
        seen.append((beta.max().item() > 1, allow_neg_eigval))
        return right(*tokens, beta=beta, allow_neg_eigval=allow_neg_eigval, **options)

    monkeypatch.setattr(selfcheck, "chunk_gated_delta_rule", rule)
    for check in selfcheck.rule_checks(torch.device("cpu"), "torch", quick=True):
        check.function(**check.inputs)
    assert set(seen) == {(False, False), (True, True)}


def test_unknown_backends_and_devices_are_errors(capsys):
    assert selfcheck.main(["--device", "cpu", "--backend", "cuda"]) == 2
    assert "backend (cuda) must be one of" in capsys.readouterr().err
    assert selfcheck.main(["--device", "gpu"]) == 2
    assert "error: Expected one of cpu, cuda" in capsys.readouterr().err
