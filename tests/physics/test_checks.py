"""Bad input to every public function of physics, and what the errors say."""

import inspect
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import scipy.sparse

from mlx_sparse_nn import csr_array, physics, vstack
from mlx_sparse_nn.physics import (
    IsingOperator,
    chain,
    checks,
    correlation,
    entanglement_entropy,
    evolve,
    exact_ground_energy,
    expectation,
    fidelity,
    from_kron_order,
    ladder,
    lanczos,
    magnetization,
    pauli_sum,
    ring,
    square,
    to_kron_order,
    transverse_field_ising,
    triangular,
    variance,
)

NAN, INF = float("nan"), float("inf")
CHAINS = [transverse_field_ising, IsingOperator, exact_ground_energy]
OBSERVED = [expectation, variance]
SOLVERS = [lanczos, evolve]
OF_SITES = [magnetization, correlation, entanglement_entropy]
ORDERS = [to_kron_order, from_kron_order]

GRIDS = [square, triangular]

H = IsingOperator(4, 0.7)
GOOD = {
    chain: {"n": 4},
    ring: {"n": 4},
    ladder: {"n_rungs": 4},
    square: {"lx": 4, "ly": 4},
    triangular: {"lx": 4, "ly": 4},
    pauli_sum: {"terms": {"ZZ": [(1.0, 0, 1)]}, "n_qubits": 4},
    transverse_field_ising: {"n_qubits": 4, "field": 0.7},
    IsingOperator: {"n_qubits": 4, "field": 0.7},
    exact_ground_energy: {"n_qubits": 4, "field": 0.7},
    expectation: {"H": H, "psi": mx.ones(16)},
    variance: {"H": H, "psi": mx.ones(16)},
    magnetization: {"psi": mx.ones(16)},
    correlation: {"psi": mx.ones(16), "axis": "z", "i": 0, "j": 3},
    entanglement_entropy: {"psi": mx.ones(16), "cut": 2},
    fidelity: {"a": mx.ones(16), "b": mx.ones(16)},
    to_kron_order: {"psi": mx.ones(16)},
    from_kron_order: {"psi": mx.ones((16, 2))},
    lanczos: {"H": H},
    evolve: {"H": H, "psi": mx.ones(16), "t": 1.0},
}
WHICH = "'smallest' or 'largest'"
# (functions, arguments, error, message)
ROWS = [
    # Sites.
    (CHAINS, {"n_qubits": 0}, ValueError, "n_qubits must be in [1, 2**31 - 1], got 0"),
    (CHAINS, {"n_qubits": -3}, ValueError, "n_qubits must be in [1, 2**31 - 1], got -3"),
    (CHAINS, {"n_qubits": 2.0}, TypeError, "n_qubits must be an integer, got 2.0"),
    (CHAINS, {"n_qubits": "4"}, TypeError, "n_qubits must be an integer, got '4'"),
    (CHAINS, {"n_qubits": True}, TypeError, "n_qubits must be an integer, got True"),
    (CHAINS, {"n_qubits": None}, TypeError, "n_qubits must be an integer, got None"),
    (
        CHAINS,
        {"n_qubits": 2, "periodic": True},
        ValueError,
        "n_qubits must be at least 3 for a ring, got 2",
    ),
    (
        [transverse_field_ising],
        {"n_qubits": 27},
        ValueError,
        "n_qubits 27 needs 2**27 * 28 stored values",
    ),
    (
        [transverse_field_ising],
        {"n_qubits": 10**6},
        ValueError,
        "n_qubits 1000000 needs 2**1000000 * 1000001 stored values",
    ),
    (
        [IsingOperator],
        {"n_qubits": 40},
        ValueError,
        "n_qubits 40 needs 2**40 amplitudes of 4 bytes",
    ),
    (
        [IsingOperator],
        {"n_qubits": 10**6},
        ValueError,
        "n_qubits 1000000 needs 2**1000000 amplitudes",
    ),
    # Flags.
    *(
        (
            [*CHAINS, *GRIDS, ladder],
            {"periodic": value},
            TypeError,
            f"periodic must be True or False, got {value!r}",
        )
        for value in ("no", 1, None, [])
    ),
    (
        [transverse_field_ising, IsingOperator],
        {"periodic": "no", "bonds": [(0, 1)]},
        TypeError,
        "periodic must be True or False, got 'no'",
    ),
    # Parameters of the chain.
    *(
        (functions, {name: value}, error, f"{name} must be {message}")
        for functions, names in (
            (CHAINS, ("field", "coupling")),
            ([transverse_field_ising, IsingOperator], ("longitudinal",)),
        )
        for name in names
        for value, error, message in (
            (NAN, ValueError, "finite, got nan"),
            (INF, ValueError, "finite, got inf"),
            ("0.5", TypeError, "real numbers, got '0.5'"),
            (None, TypeError, "real numbers, got None"),
            (True, TypeError, "real numbers, got True"),
            (1j, TypeError, "real numbers, got 1j"),
            ([[1, 2], 3], ValueError, "rectangular, got a ragged list"),
            (10**400, ValueError, "small enough for float64, got an integer of 1329 bits"),
            (-(10**5000), ValueError, "small enough for float64, got an integer of 16610 bits"),
            (mx.array(True), TypeError, "real numbers, got "),
            (mx.array(1j), TypeError, "real numbers, got "),
        )
    ),
    *(
        (
            [transverse_field_ising, IsingOperator],
            {name: values, "periodic": periodic},
            ValueError,
            f"{name} must be a number or one for each of {needs}, got shape {np.shape(values)}",
        )
        for name, values, periodic, needs in (
            ("field", [0.5] * 3, False, "4 sites"),
            ("field", mx.ones((4, 1)), False, "4 sites"),
            ("coupling", [1.0] * 4, False, "3 bonds"),
            ("coupling", mx.ones(3), True, "4 bonds"),
            ("longitudinal", np.ones((4, 1)), False, "4 sites"),
            ("longitudinal", [], False, "4 sites"),
        )
    ),
    (
        [transverse_field_ising, IsingOperator],
        {"coupling": [1, 2, INF]},
        ValueError,
        "coupling must be finite, got [1, 2, inf]",
    ),
    (
        [exact_ground_energy],
        {"field": [0.7] * 4},
        ValueError,
        "field must be a number, got shape (4,)",
    ),
    (
        [exact_ground_energy],
        {"coupling": [1.0]},
        ValueError,
        "coupling must be a number, got shape (1,)",
    ),
    *(
        (
            [transverse_field_ising, IsingOperator],
            {"dtype": dtype},
            TypeError,
            f"dtype must be a floating type or complex64, got {dtype!r}",
        )
        for dtype in (mx.int32, "float32", None)
    ),
    *(
        (
            [transverse_field_ising, IsingOperator],
            arguments,
            ValueError,
            f"energies of up to {what}",
        )
        for arguments, what in (
            ({"field": 1e39}, "4e+39 overflow mlx.core.float32"),
            ({"coupling": 3e4, "dtype": mx.float16}, "9e+04 overflow mlx.core.float16"),
            ({"longitudinal": 1e308, "dtype": mx.float64}, "inf overflow mlx.core.float64"),
        )
    ),
    # Lattices and strings.
    ([chain, ring], {"n": "4"}, TypeError, "n must be an integer, got '4'"),
    ([chain], {"n": 0}, ValueError, "n must be in [1, 2**31 - 1], got 0"),
    ([ring], {"n": 2}, ValueError, "n must be at least 3 to close a ring, got 2"),
    ([ladder], {"n_rungs": 0}, ValueError, "n_rungs must be in [1, 2**31 - 1], got 0"),
    (
        [ladder],
        {"n_rungs": 2, "periodic": True},
        ValueError,
        "n_rungs must be at least 3 to close a ring, got 2",
    ),
    *(
        row
        for name in ("lx", "ly")
        for row in (
            (GRIDS, {name: 0}, ValueError, f"{name} must be in [1, 2**31 - 1], got 0"),
            (GRIDS, {name: 1.0}, TypeError, f"{name} must be an integer, got 1.0"),
            (
                GRIDS,
                {name: 2, "periodic": True},
                ValueError,
                f"{name} must be at least 3 to close a ring, got 2",
            ),
        )
    ),
    *(
        ([transverse_field_ising, IsingOperator], {"bonds": bonds}, error, message)
        for bonds, error, message in (
            ({(0, 1): 1.0}, TypeError, "bonds must be a list of pairs of sites, got {"),
            ({(0, 1)}, TypeError, "bonds must be a list of pairs of sites, got {"),
            ([{0, 1}], TypeError, "bonds[0] must be a tuple of 2 sites, got {0, 1}"),
            (3, TypeError, "bonds must be a list of pairs of sites, got 3"),
            ("01", TypeError, "bonds must be a list of pairs of sites, got '01'"),
            ([0, 1], TypeError, "bonds[0] must be a tuple of 2 sites, got 0"),
            ([(0, 1), (1, 2, 3)], ValueError, "bonds[1] must name 2 sites, got (1, 2, 3)"),
            ([(0, 4)], ValueError, "a site of bonds[0] must be in [0, 3], got 4"),
            ([(-1, 0)], ValueError, "a site of bonds[0] must be in [0, 3], got -1"),
            ([(0, 1.0)], TypeError, "a site of bonds[0] must be an integer, got 1.0"),
            ([(2, 2)], ValueError, "bonds[0] must name different sites, got (2, 2)"),
            (
                [(0, 1), (1, 2), (1, 0)],
                ValueError,
                "bonds[2] (1, 0) repeats bonds[0]; give it once, with the sum of both couplings",
            ),
        )
    ),
    (
        [transverse_field_ising, IsingOperator],
        {"bonds": [(0, 1)], "periodic": True},
        ValueError,
        "periodic must be False where bonds are given, got True; ring(n) gives those of a ring",
    ),
    (
        [transverse_field_ising, IsingOperator],
        {"bonds": [(0, 1)], "coupling": [1.0, 2.0]},
        ValueError,
        "coupling must be a number or one for each of 1 bonds, got shape (2,)",
    ),
    (
        [IsingOperator],
        {"field": [mx.array([1.0, 2.0]), 1.0, 1.0, 1.0]},
        ValueError,
        "field[0] must be a number, got shape (2,)",
    ),
    (
        [IsingOperator],
        {"field": [mx.array(1.0), 1.0, 1.0]},
        ValueError,
        "field must be a number or one for each of 4 sites, got 3",
    ),
    (
        [IsingOperator],
        {"field": [mx.array(1.0), "1", 1.0, 1.0]},
        TypeError,
        "field[1] must be real numbers, got '1'",
    ),
    (
        [IsingOperator],
        {"field": 1e-39, "coupling": -1e-39},
        ValueError,
        "energies of at most 7e-39 vanish in mlx.core.float32; choose a smaller unit of energy",
    ),
    ([pauli_sum], {"n_qubits": 0}, ValueError, "n_qubits must be in [1, 2**31 - 1], got 0"),
    ([pauli_sum], {"n_qubits": "4"}, TypeError, "n_qubits must be an integer, got '4'"),
    (
        [pauli_sum],
        {"n_qubits": 31},
        ValueError,
        "n_qubits 31 needs 2**31 amplitudes of 4 bytes; at most 2**30 fit an axis of MLX",
    ),
    ([pauli_sum], {"dtype": mx.int32}, TypeError, "dtype must be a floating type or complex64"),
    *(
        ([pauli_sum], {"terms": terms}, error, message)
        for terms, error, message in (
            ([("ZZ", 1.0, 0, 1)], TypeError, 'terms must be a dict such as {"ZZ": [(J, 0, 1)]'),
            ({"ZI": []}, ValueError, "terms must have keys of the letters X, Y and Z, got 'ZI';"),
            ({"zz": []}, ValueError, "terms must have keys of the letters X, Y and Z, got 'zz';"),
            ({3: []}, ValueError, "terms must have keys of the letters X, Y and Z, got 3;"),
            ({"Z": 3}, TypeError, "terms['Z'] must be a list of (coefficient, site, ...), or"),
            (
                {"Z": ((1, 0), (2, 1))},
                TypeError,
                "terms['Z'][1] must be a list of places, got (2, 1)",
            ),
            ({"Z": ((1, 0),)}, TypeError, "terms['Z'] must be a list of (coefficient, site, ...),"),
            ({"Z": [3]}, ValueError, "terms['Z'][0] must be a coefficient and 1 site, got 3"),
            (
                {"ZZ": [(1.0, 0, 1), (1.0, 0)]},
                ValueError,
                "terms['ZZ'][1] must be a coefficient and 2 sites, got (1.0, 0)",
            ),
            (
                {"ZZ": [(1.0, 1, 1)]},
                ValueError,
                "terms['ZZ'][0] must name different sites, got (1, 1)",
            ),
            (
                {"ZZ": [(1.0, 0, 4)]},
                ValueError,
                "a site of terms['ZZ'][0] must be in [0, 3], got 4",
            ),
            (
                {"ZZ": [(1.0, 0, 1.0)]},
                TypeError,
                "a site of terms['ZZ'][0] must be an integer, got 1.0",
            ),
            ({"Z": [(1j, 0)]}, TypeError, "terms['Z'][0][0] must be real numbers, got 1j"),
            (
                {"Z": [(mx.array(1j), 0)]},
                TypeError,
                "terms['Z'][0][0] must be real numbers, got mlx.core.complex64",
            ),
            ({"Z": [("1", 0)]}, TypeError, "terms['Z'][0][0] must be real numbers, got '1'"),
            ({"Z": [(NAN, 0)]}, ValueError, "terms['Z'][0][0] must be finite, got nan"),
            (
                {"Z": [([1.0, 2.0], 0)]},
                ValueError,
                "terms['Z'][0][0] must be a number, got shape (2,)",
            ),
            (
                {"Z": [(mx.ones(2), 0)]},
                ValueError,
                "terms['Z'][0][0] must be a number, got shape (2,)",
            ),
            (
                {"Z": ([1.0, 2.0], [0])},
                ValueError,
                "terms['Z'][0] must be a number or one for each of 1 places, got shape (2,)",
            ),
            ({"ZZ": (1.0, [0])}, ValueError, "terms['ZZ'][1][0] must name 2 sites, got (0,)"),
            ({"Z": (1.0, [4])}, ValueError, "a site of terms['Z'][1][0] must be in [0, 3], got 4"),
            (
                {"Z": (2e38, [0, 1])},
                ValueError,
                "energies of up to 4e+38 overflow mlx.core.float32; choose a larger unit of energy",
            ),
            (
                {"Z": (1e-40, [0, 1])},
                ValueError,
                "energies of at most 2e-40 vanish in mlx.core.float32; choose a smaller unit",
            ),
        )
    ),
    (
        [pauli_sum],
        {"terms": {"XY": [(1.0, 0, 1)]}, "dtype": mx.float64},
        ValueError,
        "dtype must be complex64 for XY strings, which are imaginary, got float64",
    ),
    # Hamiltonians.
    *(
        (
            OBSERVED + SOLVERS,
            {"H": value},
            TypeError,
            f"H must be a CSRArray, an IsingOperator, a PauliSum or an mx.array, got {got};",
        )
        for value, got in (
            (np.eye(4), "ndarray"),
            (np.asmatrix(np.eye(4)), "matrix"),
            (scipy.sparse.eye_array(16).tocsr(), "csr_array"),
            (scipy.sparse.csr_matrix(np.eye(16)), "csr_matrix"),
            (3, "int"),
            (None, "NoneType"),
            ([[1]], "list"),
        )
    ),
    *(
        (OBSERVED + SOLVERS, {"H": value}, ValueError, f"H must be square, got shape {value.shape}")
        for value in (
            mx.ones((3, 4)),
            mx.ones(4),
            mx.array(1.0),
            csr_array(([1.0], [0], [0, 1]), shape=(1, 4)),
        )
    ),
    (
        SOLVERS,
        {"H": mx.array(np.triu(np.ones((16, 16), np.float32)))},
        ValueError,
        "H is not Hermitian: <u|Hv> and <Hu|v> differ by",
    ),
    (
        [lanczos],
        {"H": csr_array(([1j], [1], [0, 1, 1]), shape=(2, 2))},
        ValueError,
        "H is not Hermitian",
    ),
    (SOLVERS, {"H": mx.full((16, 16), NAN)}, ValueError, "H @ x is not finite"),
    (SOLVERS, {"H": mx.full((16, 16), INF)}, ValueError, "H @ x is not finite"),
    # States.
    *(
        (functions, {name: value}, error, f"{name} {message}")
        for functions, name in (
            ([*OBSERVED, *OF_SITES, evolve, *ORDERS], "psi"),
            ([lanczos], "v0"),
            ([fidelity], "a"),
            ([fidelity], "b"),
        )
        for value, error, message in (
            (np.ones(16), TypeError, "must be an mx.array, got ndarray"),
            ([1.0] * 16, TypeError, "must be an mx.array, got list"),
        )
    ),
    *(
        (functions, {name: value}, error, f"{name} {message}")
        for functions, name in (
            ([*OBSERVED, *OF_SITES, evolve], "psi"),
            ([lanczos], "v0"),
            ([fidelity], "a"),
            ([fidelity], "b"),
        )
        for value, error, message in (
            (mx.zeros(16), ValueError, "must not be zero"),
            (mx.zeros(16, dtype=mx.complex64), ValueError, "must not be zero"),
            (mx.full(16, NAN), ValueError, "must be finite, its largest magnitude is nan"),
            (mx.full(16, INF), ValueError, "must be finite, its largest magnitude is inf"),
        )
    ),
    *(
        (functions, {name: mx.ones(shape)}, ValueError, f"{name} has shape {shape}, {needs}")
        for functions, name, needs, shapes in (
            ([*OBSERVED, evolve], "psi", "H needs (16,)", [(8,), (16, 1), (), (0,)]),
            ([lanczos], "v0", "H needs (16,)", [(7,), (16, 1), (), (0,)]),
            (OF_SITES, "psi", "expected (2**n,) with n >= 1", [(6,), (1,), (4, 4), (), (0,)]),
            (
                ORDERS,
                "psi",
                "expected (2**n,) or (2**n, k) with n >= 1",
                [(6,), (1,), (3, 4), (4, 2, 1), (), (0,)],
            ),
            ([fidelity], "a", "expected one axis", [(16, 1), ()]),
            ([fidelity], "b", "expected one axis", [(16, 1), ()]),
        )
        for shape in shapes
    ),
    *(
        (
            functions,
            {"H": mx.zeros((0, 0)), "psi": mx.zeros(0)},
            ValueError,
            "psi must not be empty, got shape (0,)",
        )
        for functions in (OBSERVED, [evolve])
    ),
    ([fidelity], {"a": mx.zeros(0)}, ValueError, "a must not be empty, got shape (0,)"),
    ([fidelity], {"b": mx.ones(8)}, ValueError, "a has 16 amplitudes, b has 8"),
    # What is measured.
    *(
        (
            [magnetization, correlation],
            {"axis": axis},
            ValueError,
            f"axis must be 'z', 'x' or 'y', got {axis!r}",
        )
        for axis in ("w", "Z", None, 0)
    ),
    *(
        ([function], {name: value}, error, f"{name} must be {message}")
        for function, name, last in (
            (correlation, "i", 3),
            (correlation, "j", 3),
            (entanglement_entropy, "cut", 4),
        )
        for value, error, message in (
            (-1, ValueError, f"in [0, {last}], got -1"),
            (last + 1, ValueError, f"in [0, {last}], got {last + 1}"),
            (1.0, TypeError, "an integer, got 1.0"),
            (True, TypeError, "an integer, got True"),
        )
    ),
    ([entanglement_entropy], {"cut": None}, TypeError, "cut must be an integer, got None"),
    ([correlation], {"i": None}, TypeError, "i must be a site as j is, got None"),
    ([correlation], {"j": None}, TypeError, "j must be a site as i is, got None"),
    # Solvers.
    *(
        ([lanczos], {name: value}, error, f"{name} must be {message}")
        for name, minimum in (("k", 1), ("max_iter", 1))
        for value, error, message in (
            (minimum - 1, ValueError, f"in [{minimum}, 2**31 - 1], got {minimum - 1}"),
            (2**31, ValueError, f"in [{minimum}, 2**31 - 1], got 2147483648"),
            (1.0, TypeError, "an integer, got 1.0"),
            (True, TypeError, "an integer, got True"),
            ("1", TypeError, "an integer, got '1'"),
        )
    ),
    ([lanczos], {"k": None}, TypeError, "k must be an integer, got None"),
    ([lanczos], {"seed": None}, TypeError, "seed must be an integer, got None"),
    ([lanczos], {"k": 17}, ValueError, "k must be in [1, 16], the dimension of H, got 17"),
    ([lanczos], {"H": mx.zeros((0, 0))}, ValueError, "k must be in [1, 0], the dimension of H"),
    *(
        ([lanczos], {"which": which}, ValueError, f"which must be {WHICH}, got {which!r}")
        for which in ("SA", None, 1)
    ),
    ([lanczos], {"k": 3, "max_iter": 2}, ValueError, "max_iter must be at least k = 3, got 2"),
    *(
        ([function], {"tol": tol}, ValueError, f"tol must be in {interval}, got {tol}")
        for function, interval in ((lanczos, "(0, 1)"), (evolve, "[1e-14, 1)"))
        for tol in (0, 0.0, -1e-5, 1, 2.0, NAN, INF)
    ),
    ([evolve], {"tol": 1e-15}, ValueError, "tol must be in [1e-14, 1), got 1e-15"),
    *(
        (SOLVERS, {"tol": tol}, TypeError, f"tol must be a number, got {tol!r}")
        for tol in ("1e-5", True, mx.array(1e-5))
    ),
    *(([evolve], {"t": t}, ValueError, f"t must be finite, got {t}") for t in (NAN, INF, -INF)),
    *(
        ([evolve], {"t": t}, TypeError, f"t must be a number or a sequence of numbers, got {t!r}")
        for t in (None, "1", True, 1j, ["1"], [True, False])
    ),
    *(
        ([evolve], {"t": t}, ValueError, f"t must be a number or (K,) of them, got shape {shape}")
        for t, shape in (([], (0,)), (np.ones((2, 2)), (2, 2)), (mx.ones((1, 3)), (1, 3)))
    ),
    ([evolve], {"t": [[1, 2], 3]}, ValueError, "t must be rectangular, got a ragged list"),
    (
        [evolve],
        {"t": [1.0, 10**400]},
        ValueError,
        "t must be small enough for float64, got an integer of 1329 bits",
    ),
    ([evolve], {"t": [1.0, INF]}, ValueError, "t must be finite, got [1.0, inf]"),
    ([evolve], {"t": mx.array([1.0, NAN])}, ValueError, "t must be finite, got array([1, nan]"),
    ([evolve], {"t": [mx.array(1.0), 2.0]}, TypeError, "t must be numbers or one mx.array, got ["),
]
CASES = [(function, *row) for functions, *row in ROWS for function in functions]
UNCHECKED = {"imaginary"}  # true or false of any object


@pytest.mark.parametrize(("function", "arguments", "error", "message"), CASES)
def test_bad_input(function, arguments, error, message):
    with pytest.raises(error, match=re.escape(f"[{function.__name__}] {message}")):
        function(**{**GOOD[function], **arguments})


@pytest.mark.parametrize("function", GOOD, ids=lambda function: function.__name__)
def test_the_table_has_every_argument(function):
    function(**GOOD[function])
    tested = {name for other, arguments, *_ in CASES if other is function for name in arguments}
    assert set(inspect.signature(function).parameters) - UNCHECKED == tested


def test_the_table_has_every_function():
    assert {function.__name__ for function in GOOD} == set(physics.__all__) - {
        "LanczosResult",
        "PauliSum",
    }


@pytest.mark.parametrize(
    ("function", "name"),
    [
        *((function, "psi") for function in [*OBSERVED, *OF_SITES]),
        (fidelity, "a"),
        (fidelity, "b"),
    ],
)
@pytest.mark.parametrize("value", [0.0, NAN, INF])
@pytest.mark.not_emulated("needs mx.compile")
def test_a_transform_makes_nan_of_a_state_without_a_norm(function, name, value):
    """Nothing is evaluated under a transform: what is traced has no numbers yet."""

    def observable(psi):
        return function(**{**GOOD[function], name: psi})

    psi = mx.zeros(16)
    psi[3] = value
    with pytest.raises(ValueError, match=rf"\[{function.__name__}\] {name} must"):
        observable(psi)
    assert mx.isnan(mx.compile(observable)(psi)).any().item()
    assert mx.isnan(mx.vmap(observable)(psi[None])).any().item()
    total, _ = mx.value_and_grad(lambda psi: observable(psi).sum())(psi)
    assert mx.isnan(total).item()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: correlation(mx.ones(16), "z", i, 1), "[correlation] i must be an integer"),
        (lambda cut: entanglement_entropy(mx.ones(16), cut), "[entanglement_entropy] cut must be"),
        (lambda axis: magnetization(mx.ones(16), axis), "[magnetization] axis must be 'z', 'x' or"),
        (lambda tol: evolve(H, mx.ones(16), 1.0, tol=tol), "[evolve] tol must be a number"),
        (lambda n: IsingOperator(n, 0.7).diagonal(), "[IsingOperator] n_qubits must be an integer"),
        (lambda k: lanczos(H, k).energies, "[lanczos] k must be an integer"),
    ],
)
@pytest.mark.parametrize("transform", [mx.compile, mx.vmap], ids=["compile", "vmap"])
@pytest.mark.not_emulated("needs mx.compile")
def test_what_is_traced_is_named(call, message, transform):
    """It has no numbers to show: MLX would say [eval], and nothing of the argument."""
    with pytest.raises((TypeError, ValueError), match=re.escape(message)) as error:
        transform(call)(mx.ones(2, dtype=mx.int32))
    assert "traced by a transform" in str(error.value)


@pytest.mark.parametrize("value", [[[1, 2], 3], (1, [2])])
def test_a_coefficient_is_not_ragged(value):
    for rows in ([(value, 0)], (value, [0, 1])):
        with pytest.raises(ValueError, match=r"\[pauli_sum\] terms\['X'\].* must be rectangular"):
            pauli_sum({"X": rows}, 2)


def test_a_long_integer_is_a_number():
    """NumPy has no type of more than 64 bits."""
    long = IsingOperator(2, 10**30, coupling=[10**25])
    assert long.diagonal().tolist() == IsingOperator(2, 1e30, coupling=1e25).diagonal().tolist()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        *((function, "psi") for function in [*OBSERVED, *OF_SITES, *ORDERS]),
        (fidelity, "a"),
        (fidelity, "b"),
    ],
)
@pytest.mark.not_emulated("needs mx.compile")
def test_every_shape_is_refused_by_name(function, name):
    """MLX would say "[Primitive::output_shapes]", and nothing of the argument."""

    def observable(psi):
        return function(**{**GOOD[function], name: psi})

    message = f"[{function.__name__}] {name} must be traced for one shape, got shapeless=True"
    with pytest.raises(ValueError, match=re.escape(message)):
        mx.compile(observable, shapeless=True)(mx.ones(16))
    assert mx.compile(observable)(mx.ones(16)).shape == observable(mx.ones(16)).shape


@pytest.mark.not_emulated("needs mx.compile")
def test_parameters_traced_for_every_shape_are_refused():
    message = r"\[IsingOperator\] coefficients must be traced for one shape, got shapeless=True"
    with pytest.raises(ValueError, match=message):
        mx.compile(lambda h: IsingOperator(3, h).diagonal(), shapeless=True)(mx.array(0.7))


@pytest.mark.parametrize(
    "of_psi",
    [magnetization, lambda psi: IsingOperator(4, 0.7) @ psi, IsingOperator(4, 0.7).__rmatmul__],
    ids=["magnetization", "H @ x", "x @ H"],
)
@pytest.mark.not_emulated("needs mx.compile")
def test_every_shape_is_refused_where_compiled_before_the_first_operator(of_psi):
    """As ``@partial(mx.compile, shapeless=True)`` is at the top of a script."""
    IsingOperator(1, 0.0)  # from which on the package notes what is traced
    unnoted = mx.compile.__wrapped__
    with pytest.raises(ValueError, match=r"^\[.*must be traced for one shape, got shapeless=True"):
        unnoted(of_psi, shapeless=True)(mx.ones(16))


@pytest.mark.parametrize(
    ("function", "name"), [(lanczos, "H"), (evolve, "psi"), (exact_ground_energy, "field")]
)
@pytest.mark.parametrize("transform", [mx.compile, mx.vmap], ids=["compile", "vmap"])
@pytest.mark.not_emulated("needs mx.compile")
def test_who_reads_numbers_refuses_what_has_none(function, name, transform):
    """As README.md says of them: they take the derivatives alone."""

    def solve(number):
        made = {"H": lambda: IsingOperator(4, number), "psi": lambda: number * mx.ones(16)}
        result = function(**{**GOOD[function], name: made.get(name, lambda: number)()})
        return result.energies if function is lanczos else result

    with pytest.raises(ValueError, match=rf"\[{function.__name__}\] {name} must hold numbers"):
        transform(solve)(mx.array([0.7, 0.8]) if transform is mx.vmap else mx.array(0.7))
    assert mx.isfinite(mx.grad(lambda x: mx.abs(solve(x)).sum())(mx.array(0.7))).item()


A = H.tocsr()
operand: Any = H  # which types refuse, too


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda: A + operand, "x.tocsr() makes it one of this package"),
        (lambda: A @ operand, "x.tocsr() makes it one of this package"),
        (lambda: vstack([A, operand]), "x.tocsr() makes one of it"),
        (lambda: A + scipy.sparse.eye(16).tocsr(), "from_scipy(x) makes it one of this"),
    ],
)
def test_an_operator_beside_a_sparse_array_says_what_makes_it_one(compute, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        compute()


def test_a_state_is_checked_in_a_new_thread():
    """Where MLX traces a compiled function for the first time."""
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="must not be zero"):
        pool.submit(lambda: magnetization(mx.zeros(8))).result()


@pytest.mark.parametrize("function", SOLVERS, ids=lambda function: function.__name__)
@pytest.mark.parametrize(
    ("product", "error", "message"),
    [
        (lambda x: np.array(x), TypeError, "H @ x must be an mx.array, got ndarray"),
        (lambda x: x[:3], ValueError, "H @ x has shape (3,), x has (16,)"),
    ],
)
def test_the_product_of_a_hamiltonian_is_checked(function, product, error, message):
    class Odd:
        shape = (16, 16)

        def __matmul__(self, x):
            return product(x)

    with pytest.raises(error, match=re.escape(f"[{function.__name__}] {message}")):
        function(**{**GOOD[function], "H": Odd()})


@pytest.mark.parametrize("shape", [(), (8,), (8, 16), (16, 8, 2)])
def test_operands_of_an_operator_have_its_inner_size(shape):
    message = f"[H @ x] H is (16, 16), x has shape {shape}: inner sizes differ"
    with pytest.raises(ValueError, match=re.escape(message)):
        _ = H @ mx.ones(shape)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (None, "x must be numeric, got"),
        (["1"] * 16, "x must be numeric, got"),
        (H, "x is an operator; apply one after the other to a state"),
        (H.tocsr(), "x is a sparse array; use H.tocsr() in place of H"),
    ],
    ids=["None", "str", "operator", "sparse"],
)
def test_operands_of_an_operator_are_dense_numbers(x, message):
    with pytest.raises(TypeError, match=re.escape(f"[H @ x] {message}")):
        _ = H @ x


@pytest.mark.parametrize(
    ("function", "arguments", "memory", "message"),
    [
        (
            transverse_field_ising,
            {"n_qubits": 25},
            2**28,
            "n_qubits 25 needs 13.00 GiB, this machine has 0.25 GiB",
        ),
        (
            IsingOperator,
            {"n_qubits": 25},
            2**28,
            "n_qubits 25 needs 0.50 GiB, this machine has 0.25 GiB",
        ),
        (
            lanczos,
            {"H": IsingOperator(20, 0.7)},
            2**26,
            "40 vectors of 1048576 needs 0.16 GiB, this machine has 0.06 GiB",
        ),
        (
            evolve,
            {"H": IsingOperator(20, 0.7), "psi": mx.ones(2**20)},
            2**26,
            "a basis of 33 vectors of 1048576 needs 0.32 GiB, this machine has 0.06 GiB",
        ),
    ],
)
def test_says_how_much_memory_is_needed(monkeypatch, function, arguments, memory, message):
    page = 2**12
    sizes = {"SC_PAGE_SIZE": page, "SC_PHYS_PAGES": memory // page}
    monkeypatch.setattr(checks.os, "sysconf", sizes.__getitem__)
    with pytest.raises(ValueError, match=re.escape(f"[{function.__name__}] {message}")):
        function(**{**GOOD[function], **arguments})
