/// Two forms of one computation and whether they agree.
module MiniSeq.Properties.Forms

open FsCheck.FSharp
open TorchSharp
open MiniSeq.Properties.Generators

type torch = TorchSharp.torch
type Tensor = TorchSharp.torch.Tensor
type Module = TorchSharp.torch.nn.Module

/// What a form gave, by name: results, and gradients where there are any.
type Outcome = (string * Tensor option) list

let dtype =
    function
    | Float64 -> torch.ScalarType.Float64
    | Float32 -> torch.ScalarType.Float32
    | BFloat16 -> torch.ScalarType.BFloat16

/// How far the forms may lie apart: they differ in the order of sums, so by a few roundings (1e-16, 6e-8, 4e-3), which cancellation
/// inside a form, such as a norm's backward or a softmax minus its mean, makes larger. In float64 there is room for that in every
/// entry, against the largest of its tensor. In float32 and bfloat16 cancellation may leave nothing of a small tensor, so there it
/// is the norm of all tensors together; a fault of a formula is one in float64 too.
let tolerance =
    function
    | Float64 -> 1e-10
    | Float32 -> 2e-4
    | BFloat16 -> 0.05

let private largest (t: Tensor) =
    if t.numel () = 0L then
        0.0
    else
        t.abs().max().to_type(torch.ScalarType.Float64).item<float>()

/// Largest |got − want| against the largest |want|, or against a hundredth of the largest entry of all gradients where this one
/// is next to nothing. No gradient is as good as a zero one, but a frozen parameter must have none.
let private difference floor (got: Tensor option) (want: Tensor option) =
    let relative (t: Tensor) scale =
        let d = largest t

        if d = 0.0 then 0.0
        elif System.Double.IsFinite d then d / max scale floor
        else infinity

    match got, want with
    | None, None -> 0.0
    | Some g, Some w when g.shape <> w.shape -> infinity
    | Some g, Some w -> relative (g.to_type torch.ScalarType.Float64 - w.to_type torch.ScalarType.Float64) (largest w)
    | None, Some w -> if largest w = 0.0 then 0.0 else infinity
    | Some _, None -> infinity

/// The tensor that is farthest off, and by how much.
let private worst (got: Outcome) (want: Outcome) =
    let finite =
        Seq.append got want
        |> Seq.choose snd
        |> Seq.map largest
        |> Seq.filter System.Double.IsFinite

    let floor = 0.01 * Seq.max (Seq.append [ 0.0 ] finite)

    List.map2 (fun (name, g) (_, w) -> name, difference floor g w) got want
    |> List.maxBy snd

/// ‖got − want‖ / ‖want‖ over all tensors; infinite where one is missing.
let private together (got: Outcome) (want: Outcome) =
    if not (System.Double.IsFinite(snd (worst got want))) then
        infinity
    else
        let norm (t: Tensor) =
            t.to_type(torch.float64).pow(2.0.ToScalar()).sum().item<float>()

        let pairs =
            List.zip got want
            |> List.choose (fun ((_, g), (_, w)) -> Option.map2 (fun g w -> g, w) g w)

        let off =
            pairs
            |> List.sumBy (fun (g, w) -> norm (g.to_type torch.float64 - w.to_type torch.float64))

        if off = 0.0 then
            0.0
        else
            sqrt (off / List.sumBy (snd >> norm) pairs)

/// Both forms gave the same names, and the same numbers within the bound.
let agreeWithin bound (got: Outcome) (want: Outcome) =
    if List.map fst got <> List.map fst want then
        failwith $"names differ: %A{List.map fst got} and %A{List.map fst want}"

    let name, off = worst got want

    (off <= bound)
    |> Prop.label $"{name} differs by %.1e{off} of the largest entry; %.0e{bound} is allowed"

let private agreeTogether bound got want =
    let off = together got want

    (off <= bound)
    |> Prop.label $"all together differ by %.1e{off}, {fst (worst got want)} most; %.0e{bound} is allowed"

let agree precision =
    (if precision = Float64 then agreeWithin else agreeTogether) (tolerance precision)

/// The form equals the plain one. The plain form in float64, from the same numbers, is the truth, and the form may be a few times as
/// far from it as the plain form in the same type is: both round as often, at other places. In bfloat16 one draw of roundings may be
/// lucky; those of float32, 2^16 times smaller, are a second one.
let agreeWithTruth precision got plain =
    let truth = plain torch.float64
    let off dtype = together (plain dtype) truth

    match precision with
    | Float64 -> agree Float64 got truth
    | Float32 -> agreeTogether (tolerance Float32 + 3.0 * off torch.float32) got truth
    | BFloat16 ->
        let rounding = max (off torch.bfloat16) (65536.0 * off torch.float32)
        agreeTogether (tolerance BFloat16 + 3.0 * rounding) got truth

/// A case in a dispose scope of its own, on one thread: the cases are tiny, and on a busy machine threads would wait for each other.
let inScope (body: unit -> 'T) =
    torch.set_num_threads 1
    use _ = torch.NewDisposeScope()
    body ()

let gradient (t: Tensor) =
    t.grad |> Option.ofObj |> Option.map (fun g -> g.clone ())

let clear (m: Module) =
    for p in m.parameters () do
        p.grad <- null

let gradientsOf (m: Module) : Outcome =
    [ for struct (name, p) in m.named_parameters () -> name, gradient p ]

/// Parameters drawn anew (a bias begins at 0, where a fault would hide), norms around 1, and the named ones frozen.
let prepare (seed: int) (frozen: string list) (m: Module) =
    torch.random.manual_seed (int64 seed) |> ignore

    for struct (name, p) in m.named_parameters () do
        use _ = torch.no_grad ()

        if name.Contains "norm" then
            p.uniform_ (0.5, 1.5) |> ignore
        else
            p.normal_ (0.0, 0.5) |> ignore

        p.requires_grad <- not (List.exists (fun (part: string) -> name.Contains part) frozen)

/// The parameters of a module, and what is frozen, put into another of the same shape.
let copy (source: Module) (target: Module) =
    use _ = torch.no_grad ()

    for a, b in Seq.zip (source.parameters ()) (target.parameters ()) do
        b.copy_ a |> ignore
        b.requires_grad <- a.requires_grad

/// The numbers of the input.
let inputOf (rows: Rows) =
    let shape =
        if rows.Transposed then
            [| rows.Length; rows.Batch; rows.Hidden |]
        else
            [| rows.Batch; rows.Length; rows.Hidden |]

    torch.randn (Array.map int64 shape, dtype = dtype rows.Precision)

/// [batch, length, hidden] of an input.
let private view (rows: Rows) (t: Tensor) =
    if rows.Transposed then t.transpose (0, 1) else t

/// A computation on [batch, length, hidden] and the module whose parameters it uses.
type Form =
    {
        Module: Module
        Call: Tensor -> Tensor
    }

    interface System.IDisposable with
        member form.Dispose() = form.Module.Dispose()

/// The output of a form and, with those that were there before, the gradients of its input and of every parameter.
let runOnto (form: Form) (rows: Rows) (x: Tensor) upstream : Outcome =
    let x = x.detach().requires_grad_(not rows.InputFrozen)
    let y = form.Call(view rows x)

    if y.requires_grad then
        torch.autograd.backward ([| y |], [| upstream y |])

    [ "output", Some(y.detach ()); "input gradient", gradient x ]
    @ gradientsOf form.Module

let run (form: Form) rows x upstream =
    clear form.Module
    runOnto form rows x upstream

/// A gradient for y that is the same in every precision.
let drawn (rows: Rows) (y: Tensor) =
    torch.random.manual_seed (int64 rows.Seed + 1L) |> ignore
    torch.randn(y.shape, dtype = torch.float64).to_type(dtype rows.Precision).to_type(y.dtype)

/// Which of n labels count, and what they are.
let labelsOf (seed: int) n vocabulary labels =
    torch.random.manual_seed (int64 seed + 2L) |> ignore

    let wanted =
        torch.randint (0L, int64 vocabulary, [| int64 n |], dtype = torch.ScalarType.Int64)

    let draws = torch.rand [| int64 n |]

    let ignored (mask: Tensor) =
        wanted.masked_fill (mask, (-100L).ToScalar())

    match labels with
    | Every -> wanted
    | Nothing -> ignored (torch.ones_like(wanted).to_type torch.ScalarType.Bool)
    | Single at -> ignored (torch.arange(int64 n).ne(torch.tensor (int64 (abs at % n))))
    | Scattered tenths -> ignored (draws.ge (torch.tensor (0.1f * float32 tenths)))
