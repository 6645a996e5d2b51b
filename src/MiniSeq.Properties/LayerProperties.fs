/// What holds for every layer, whatever its shape, its chunk and what is trained.
[<FsCheck.Xunit.Properties(Arbitrary = [| typeof<MiniSeq.Properties.Generators.Cases> |], MaxTest = 100)>]
module MiniSeq.Properties.LayerProperties

open FsCheck
open FsCheck.FSharp
open FsCheck.Xunit
open TorchSharp
open MiniSeq.Layers
open MiniSeq.Properties.Generators
open MiniSeq.Properties.Forms
open global.Xunit

type nn = TorchSharp.torch.nn
type Layer = TorchSharp.torch.nn.Module<Tensor, Tensor>

// The laws.

/// chunked: form for a chunk and an element type; plain: the same parameters, as a user of TorchSharp would write it.
let private equalsPlain (rows: Rows) frozen upstream chunked plain =
    inScope (fun () ->
        use chunked: Form = chunked rows.Chunk (dtype rows.Precision)
        prepare rows.Seed frozen chunked.Module
        let x = inputOf rows

        let plain dtype =
            use plain: Form = plain dtype
            copy chunked.Module plain.Module
            run plain rows (x.to_type dtype) upstream

        agreeWithTruth rows.Precision (run chunked rows x upstream) plain)

let private ignoresTheChunk (rows: Rows) frozen upstream chunked (other: int) =
    inScope (fun () ->
        use one: Form = chunked rows.Chunk (dtype rows.Precision)
        use other: Form = chunked other (dtype rows.Precision)
        prepare rows.Seed frozen one.Module
        copy one.Module other.Module
        let x = inputOf rows
        agree rows.Precision (run one rows x upstream) (run other rows x upstream))

/// grad → grad + gradient, for a gradient that was there before.
let private accumulates (rows: Rows) frozen upstream chunked =
    inScope (fun () ->
        use form: Form = chunked rows.Chunk (dtype rows.Precision)
        prepare rows.Seed frozen form.Module
        let x = inputOf rows
        let once = run form rows x upstream
        clear form.Module

        let before =
            [
                for p in form.Module.parameters () ->
                    let there = p.requires_grad && p.dim () = 2L // some have one, some don't
                    let type' = Gradients.AccumulationType p.dtype

                    if there then
                        p.grad <- torch.randn (p.shape, dtype = type')

                    gradient p
            ]

        let add (name, gradient: Tensor option) before =
            match gradient, before with
            | Some g, Some(b: Tensor) -> name, Some(g + b)
            | None, b -> name, b
            | g, None -> name, g

        let want = List.map2 add once ([ None; None ] @ before)
        agree rows.Precision (runOnto form rows x upstream) want)

// Gated MLP.

let private chunkedMlp (c: MlpCase) (chunk: int) dtype =
    let activation = if c.Gelu then Activation.GeluTanh else Activation.Silu

    let mlp =
        new GatedMlp(c.Rows.Hidden, c.Intermediate, activation, c.Bias, chunk, dtype)

    { Module = mlp; Call = mlp.call }

let private plainMlp (c: MlpCase) dtype =
    let mlp = new GatedMlp(c.Rows.Hidden, c.Intermediate, bias = c.Bias, dtype = dtype)

    let activation x =
        if c.Gelu then
            nn.functional.gelu (x, Modules.GELU.Approximate.tanh)
        else
            nn.functional.silu x

    {
        Module = mlp
        Call = fun x -> mlp.DownProj.call (activation (mlp.GateProj.call x) * mlp.UpProj.call x)
    }

[<Property>]
let ``a chunked gated MLP equals the plain one`` (c: MlpCase) =
    equalsPlain c.Rows c.Frozen (drawn c.Rows) (chunkedMlp c) (plainMlp c)

[<Property>]
let ``a gated MLP does not depend on its chunk`` (c: MlpCase) (Chunk other) =
    ignoresTheChunk c.Rows c.Frozen (drawn c.Rows) (chunkedMlp c) other

[<Property>]
let ``a gated MLP adds to the gradients that are there`` (c: MlpCase) =
    accumulates c.Rows c.Frozen (drawn c.Rows) (chunkedMlp c)

// Any row-wise module of a user's own.

let private feedForward (c: MlpCase) (dtype: torch.ScalarType) : Layer =
    let linear (a: int, b: int) : Layer =
        nn.Linear(a, b, hasBias = c.Bias, dtype = dtype)

    nn.Sequential(
        struct ("gate_proj", linear (c.Rows.Hidden, c.Intermediate)),
        struct ("act", (nn.GELU(): Layer)),
        struct ("down_proj", linear (c.Intermediate, c.Rows.Hidden + 1))
    )

let private wrapped (c: MlpCase) (chunk: int) dtype =
    let layer = new MiniSequence(feedForward c dtype, chunk)
    { Module = layer; Call = layer.call }

let private unwrapped (c: MlpCase) dtype =
    let layer = feedForward c dtype
    { Module = layer; Call = layer.call }

[<Property>]
let ``a wrapped feed-forward equals the module itself`` (c: MlpCase) =
    equalsPlain c.Rows c.Frozen (drawn c.Rows) (wrapped c) (unwrapped c)

[<Property>]
let ``a wrapped feed-forward does not depend on its chunk`` (c: MlpCase) (Chunk other) =
    ignoresTheChunk c.Rows c.Frozen (drawn c.Rows) (wrapped c) other

[<Property>]
let ``a wrapped feed-forward adds to the gradients that are there`` (c: MlpCase) =
    accumulates c.Rows c.Frozen (drawn c.Rows) (wrapped c)

/// x → W (x ⊙ mask) is linear, so ⟨dy, y⟩ = ⟨dx, x⟩ if and only if backward draws the mask of forward.
[<Property>]
let ``a wrapped dropout draws the same mask again`` (rows: Rows) =
    let rows =
        { rows with
            Precision = Float64
            InputFrozen = false
        }

    inScope (fun () ->
        use layer =
            new MiniSequence(
                nn.Sequential(nn.Dropout 0.5, nn.Linear(rows.Hidden, 5, hasBias = false, dtype = torch.float64)),
                rows.Chunk
            )

        let form = { Module = layer; Call = layer.call }
        torch.random.manual_seed (int64 rows.Seed) |> ignore
        let x = inputOf rows
        let outcome = run form rows x (drawn rows)
        let dot (a: Tensor) (b: Tensor) = Some((a * b).sum())

        match outcome with
        | (_, Some y) :: (_, Some dx) :: _ -> agree Float64 [ "⟨dx, x⟩", dot dx x ] [ "⟨dx, x⟩", dot y (drawn rows y) ]
        | _ -> false |> Prop.label "no input gradient")

// LM head and loss.

let private headOf (c: HeadCase) (dtype: torch.ScalarType) =
    new Projection(c.Rows.Hidden, c.Vocabulary, c.Bias, dtype)

let private softcap (c: HeadCase) =
    if c.Capped then System.Nullable 2.0 else System.Nullable()

let private labels (c: HeadCase) =
    (labelsOf c.Rows.Seed (c.Rows.Batch * c.Rows.Length) c.Vocabulary c.Labels).view(c.Rows.Batch, c.Rows.Length)

let private upstream (c: HeadCase) (loss: Tensor) =
    torch.full_like (loss, c.Upstream.ToScalar())

let private chunkedLoss c (chunk: int) dtype =
    let head = headOf c dtype

    {
        Module = head
        Call = fun x -> LinearCrossEntropy.Loss(x, head, labels c, chunk, softcap c).LossSum
    }

let private plainLoss c dtype =
    let head = headOf c dtype

    let capped (z: Tensor) =
        if c.Capped then
            z.div((2.0).ToScalar()).tanh().mul((2.0).ToScalar())
        else
            z

    let logits (x: Tensor) =
        (capped (head.call x)).view(-1, c.Vocabulary)

    {
        Module = head
        Call = fun x -> nn.functional.cross_entropy (logits x, (labels c).view -1, reduction = nn.Reduction.Sum)
    }

/// One batch element at a time, and the sum of their losses.
let private lossInParts c (chunk: int) dtype =
    let head = headOf c dtype

    let loss (x: Tensor) =
        [
            for i in 0L .. int64 c.Rows.Batch - 1L ->
                LinearCrossEntropy.Loss(x.select (0, i), head, (labels c).select(0, i), chunk, softcap c).LossSum
        ]
        |> List.reduce (fun a b -> a + b)

    { Module = head; Call = loss }

[<Property>]
let ``a chunked loss equals the plain one`` (c: HeadCase) =
    equalsPlain c.Rows c.Frozen (upstream c) (chunkedLoss c) (plainLoss c)

[<Property>]
let ``a loss does not depend on its chunk`` (c: HeadCase) (Chunk other) =
    ignoresTheChunk c.Rows c.Frozen (upstream c) (chunkedLoss c) other

[<Property>]
let ``a loss adds to the gradients that are there`` (c: HeadCase) =
    accumulates c.Rows c.Frozen (upstream c) (chunkedLoss c)

[<Property>]
let ``losses of parts add up to the loss of the whole`` (c: HeadCase) =
    equalsPlain c.Rows c.Frozen (upstream c) (lossInParts c) (fun dtype -> chunkedLoss c 0 dtype)

[<Property>]
let ``a loss counts its labels, and without any is zero with zero gradients`` (c: HeadCase) =
    inScope (fun () ->
        use head = headOf c (dtype c.Rows.Precision)
        prepare c.Rows.Seed [] head
        let x = (inputOf { c.Rows with Transposed = false }).requires_grad_()

        let none =
            LinearCrossEntropy.Loss(x, head, torch.full_like (labels c, (-100L).ToScalar()), c.Rows.Chunk)

        none.LossSum.backward ()
        let zero (t: Tensor) = Some(torch.zeros_like t)

        let outcome =
            ("loss", Some(none.LossSum.detach ()))
            :: ("input gradient", gradient x)
            :: gradientsOf head

        let counted = LinearCrossEntropy.Loss(x, head, labels c, c.Rows.Chunk).TokenCount
        let wanted = (labels c).ne((-100L).ToScalar()).sum().item<int64>()

        ((none.TokenCount = 0L && none.Mean = 0.0 && counted = wanted)
         |> Prop.label $"{counted} of {wanted} labels counted")
        .&. (List.forall (snd >> Option.isSome) outcome |> Prop.label "a gradient is missing")
        .&. agreeWithin 0.0 outcome [ for name, t in outcome -> name, Option.bind zero t ])

/// Shapes on both sides of where a kernel begins: 64 rows, 16 terms a column, whole vectors.
let private headInputShape =
    gen {
        let! rows = Gen.elements [ 1; 63; 64; 65; 256; 257; 600 ]
        let! width = Gen.elements [ 1; 16; 24; 48; 272 ]
        let! termsOfColumn = Gen.elements [ 8; 16; 17; 33 ]
        let! more = Gen.elements [ 0; 1; 2; 32 ]
        return rows, width, width * termsOfColumn + more
    }

[<Fact>]
let ``the gradient of what a bfloat16 head reads equals that in float64`` () =
    let equal (rows: int, width: int, vocabulary: int) =
        inScope (fun () ->
            use head = new Projection(width, vocabulary, dtype = torch.bfloat16)
            prepare rows [] head
            let exact (t: Tensor) = t.``to`` torch.float64
            let dLogits = torch.randn(rows, vocabulary).``to`` torch.bfloat16
            let want = (exact dLogits).mm(exact head.Weight)
            let bound = 0.005 * (want.abs().max().item<float>())
            let error = (exact (head.InputGradient dLogits) - want).abs().max().item<float>()
            error <= bound |> Prop.label $"{error} and not {bound}")

    Check.One(Config.QuickThrowOnFailure.WithMaxTest 50, Prop.forAll (Arb.fromGen headInputShape) equal)

let private memoryIsBounded (c: MemoryCase) =
    let type' = dtype c.Precision
    let accumulator = int64 ((Gradients.AccumulationType type').ElementSize())
    let rows, vocabulary, hidden = c.Chunk * c.Chunks, c.Vocabulary, c.Hidden

    /// The most that one forward and backward adds to what was alive.
    let peak loss =
        inScope (fun () ->
            use head = new Projection(hidden, vocabulary, dtype = type')
            let x = torch.randn (rows, hidden, dtype = type', requires_grad = true)

            let labels =
                torch.randint (0L, int64 vocabulary, [| int64 rows |], dtype = torch.ScalarType.Int64)

            let before = TensorMemory.LiveBytes
            TensorMemory.ResetPeak()
            inScope (fun () -> (loss x head labels: Tensor).backward())
            TensorMemory.PeakBytes - before)

    let chunked =
        peak (fun x head labels -> LinearCrossEntropy.Loss(x, head, labels, c.Chunk).LossSum)

    let plain =
        peak (fun x head labels -> nn.functional.cross_entropy (head.call x, labels, reduction = nn.Reduction.Sum))
    // Logits in the head's type and in the wide one; the head's gradient, its sum and a product; rows; oneDNN's scratch.
    let ofChunk = 2L * int64 c.Chunk * int64 vocabulary * accumulator
    let ofHead = 3L * int64 vocabulary * int64 hidden * accumulator
    let ofRows = int64 rows * (4L * int64 hidden * accumulator + 64L)
    let ofScratch = 131072L + 128L * int64 vocabulary
    let bound = ofChunk + ofHead + ofRows + ofScratch

    (chunked <= bound && bound < plain)
    |> Prop.label $"chunked {chunked}, bound {bound} = {ofChunk} + {ofHead} + {ofRows} + {ofScratch}, plain {plain}"

[<Fact>]
let ``memory of a chunked loss does not grow with rows times vocabulary`` () =
    Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here")
    Check.One(Config.QuickThrowOnFailure.WithArbitrary([ typeof<Cases> ]).WithMaxTest 100, memoryIsBounded)

// Norm and attention against their written form.

[<Property>]
let ``a norm and its chunked backward equal the written form`` (rows: Rows) (unitOffset: bool) =
    let rows =
        { rows with
            Transposed = false
            InputFrozen = false
        }

    inScope (fun () ->
        use norm = new RmsNorm(rows.Hidden, 1e-3, dtype rows.Precision, null, unitOffset)
        prepare rows.Seed [] norm
        let x = (inputOf rows).flatten(0L, 1L)

        let written dtype =
            use plain = new RmsNorm(rows.Hidden, 1e-3, dtype, null, unitOffset)
            copy norm plain

            let rms (x: Tensor) =
                (x.pow(2.0.ToScalar()).mean([| -1L |], keepdim = true) + (1e-3).ToScalar()).sqrt()

            let form =
                {
                    Module = plain
                    Call =
                        fun x ->
                            x / rms x
                            * (if unitOffset then
                                   plain.Weight + (1.0).ToScalar()
                               else
                                   plain.Weight)
                }

            run form rows (x.to_type dtype) (drawn rows)

        use _ = torch.no_grad ()
        let y = norm.call x
        let dy, dx = drawn rows y, torch.zeros_like x

        Chunking.ForEach(
            x.size 0,
            Chunking.Rows(rows.Chunk, x.size 0, rows.Hidden, x.dtype),
            fun start count ->
                dx
                    .narrow(0, start, count)
                    .copy_(norm.Backward(x.narrow (0, start, count), dy.narrow (0, start, count)))
                |> ignore
        )

        let truth dtype =
            use _ = torch.enable_grad ()
            written dtype

        agreeWithTruth rows.Precision ([ "output", Some y; "input gradient", Some dx ] @ gradientsOf norm) truth)

/// softmax(cap(scale · Q Kᵀ) + mask) V, in which a row sees the rows before it, as far as its window, in its own document.
let private writtenAttention (c: AttentionCase) (q: Tensor) (k: Tensor) (v: Tensor) =
    let heads (t: Tensor) : Tensor =
        t.repeat_interleave(int64 c.Groups, dim = 1L).transpose(0, 1)

    let document =
        torch.tensor
            [|
                for i, n in List.indexed c.Lengths do
                    yield! Array.replicate n (int64 i)
            |]

    let unseen = document.unsqueeze(1).ne(document.unsqueeze 0)
    let all = torch.ones ([| document.size 0; document.size 0 |], dtype = torch.bool)
    let future = all.triu 1

    let past =
        if c.Window = 0 then
            torch.zeros_like all
        else
            all.tril -c.Window

    let scores =
        q.transpose(0, 1).matmul((heads k).transpose(1, 2)).mul(c.Scale.ToScalar())

    let scores =
        if c.Capped then
            scores.div((2.0).ToScalar()).tanh().mul((2.0).ToScalar())
        else
            scores

    let hidden = unseen.logical_or(future).logical_or past
    scores.masked_fill(hidden, (-infinity).ToScalar()).softmax(-1).matmul(heads v).transpose(0, 1)

/// A form of attention, given q, k, v and dy, against the written one: its output, dq, dk and dv.
let private equalsWrittenAttention (c: AttentionCase) form =
    inScope (fun () ->
        torch.random.manual_seed (int64 c.Seed) |> ignore
        let rows = List.sum c.Lengths

        let draw (heads: int) =
            torch.randn (rows, heads, c.HeadDim, dtype = dtype c.Precision)

        let heads = c.KvHeads * c.Groups
        let q, k, v, dy = draw heads, draw c.KvHeads, draw c.KvHeads, draw heads
        // bfloat16 is held against float64, entry by entry: an average over all would hide a row that sees one key too many.
        let wide =
            if c.Precision = BFloat16 then
                torch.float64
            else
                dtype c.Precision

        let leaves = [ for t in [ q; k; v ] -> t.to_type(wide).detach().requires_grad_() ]
        let y = writtenAttention c leaves[0] leaves[1] leaves[2]
        torch.autograd.backward ([| y |], [| dy.to_type wide |])

        let outcome tensors =
            List.zip [ "output"; "dq"; "dk"; "dv" ] tensors

        (if c.Precision = BFloat16 then
             agreeWithin 0.03
         else
             agree c.Precision)
            (form q k v dy |> List.map Some |> outcome)
            (outcome (Some(y.detach ()) :: [ for t in leaves -> gradient t ])))

let private window (c: AttentionCase) =
    if c.Window = 0 then
        System.Nullable()
    else
        System.Nullable(int64 c.Window)

let private cap (c: AttentionCase) =
    if c.Capped then System.Nullable 2.0 else System.Nullable()

[<Property>]
let ``attention of packed documents equals the written form`` (c: AttentionCase) =
    let lengths = [| for n in c.Lengths -> int64 n |]

    equalsWrittenAttention c (fun q k v dy ->
        let forward = Attention.Forward(q, k, v, lengths, c.Scale, window c, cap c)

        let struct (dq, dk, dv) =
            Attention.Backward(dy, q, k, v, forward, lengths, c.Scale, window c, cap c)

        [ forward.Output; dq; dk; dv ])

[<Property>]
let ``attention in tiles equals the written form`` (c: AttentionCase) =
    let c =
        { c with
            Lengths = [ List.sum c.Lengths ]
        }

    equalsWrittenAttention c (fun q k v dy ->
        let tiled =
            TiledAttention(c.Scale, window c, cap c, int64 (fst c.Tile), int64 (snd c.Tile))

        let struct (y, lse) = tiled.Forward(q, k, v)
        let struct (dq, dk, dv) = tiled.Backward(dy, q, k, v, y, lse)
        [ y; dq; dk; dv ])

// Recomputation.

/// The steps as a module; with recompute, its blocks are recomputed as they ask for.
type private Network(steps: Step list, hidden: int, recompute: bool) as this =
    inherit Layer("Network")

    let build i step : Tensor -> Tensor =
        let add (layer: Layer) =
            this.register_module (string i, layer)
            layer

        match step with
        | Linear -> (add (nn.Linear(hidden, hidden, dtype = torch.float64))).call
        | Gelu -> nn.functional.gelu
        | Dropout -> (add (nn.Dropout 0.3)).call
        | Function steps ->
            let block = add (new Network(steps, hidden, recompute))

            if recompute then
                (fun x -> Recompute.Run(block.call, x))
            else
                block.call
        | Module steps ->
            let block = add (new Network(steps, hidden, recompute))

            if recompute then
                (fun x -> Recompute.Run(block, x))
            else
                block.call

    let layers = List.mapi build steps

    override _.forward x =
        List.fold (fun x layer -> layer x) x layers

[<Property>]
let ``recomputation changes nothing, at any depth and with dropout`` (c: NetworkCase) =
    let rows = { c.Rows with Precision = Float64 }

    inScope (fun () ->
        let network recompute =
            let network = new Network(c.Steps, rows.Hidden, recompute)

            {
                Module = network
                Call = network.call
            }

        use off = network false
        use on = network true
        prepare rows.Seed c.Frozen off.Module
        copy off.Module on.Module
        let x = inputOf rows

        let outcome form =
            torch.random.manual_seed (int64 rows.Seed) |> ignore
            let result = run form rows x torch.ones_like
            result @ [ "the next random number", Some(torch.rand 1L) ]

        agree Float64 (outcome on) (outcome off))
