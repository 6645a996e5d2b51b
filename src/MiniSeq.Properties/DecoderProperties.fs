/// What holds for a whole training step: driven, in mini-sequences, over packed documents.
[<FsCheck.Xunit.Properties(Arbitrary = [| typeof<MiniSeq.Properties.Generators.Cases> |], MaxTest = 100)>]
module MiniSeq.Properties.DecoderProperties

open FsCheck
open FsCheck.FSharp
open FsCheck.Xunit
open TorchSharp
open MiniSeq.Layers
open MiniSeq.Models
open MiniSeq.Properties.Generators
open MiniSeq.Properties.Forms

let private given condition (value: 'T) =
    if condition then
        System.Nullable value
    else
        System.Nullable()

let private ropeScaling: int -> RopeScaling | null =
    function
    | 1 -> LinearRopeScaling 4.0
    | 2 -> Llama3RopeScaling(8.0, 1.0, 4.0, 16)
    | 3 -> YarnRopeScaling(4.0, 8)
    | _ -> null

let configAs modelType (c: DecoderCase) =
    let extras = c.Extras

    let layerTypes: LayerType array | null =
        if extras.Window = 0 then
            null
        else
            [|
                for layer in 1 .. c.Layers ->
                    if extras.Alternate && layer % 2 = 0 then
                        LayerType.FullAttention
                    else
                        LayerType.SlidingAttention
            |]

    DecoderConfig(
        ModelType = modelType,
        VocabSize = c.Vocabulary,
        HiddenSize = c.Hidden,
        IntermediateSize = c.Intermediate,
        NumHiddenLayers = c.Layers,
        NumAttentionHeads = c.KvHeads * c.Groups,
        NumKeyValueHeads = c.KvHeads,
        HeadDim = 2 * c.HalfHeadDim,
        RopeTheta = (if c.Seed % 2 = 0 then 10000.0 else 500000.0),
        EosTokenIds = [| for i in 1 .. c.Seed % 3 -> i |],
        BosTokenId =
            (if c.Seed % 5 = 0 then
                 System.Nullable()
             else
                 System.Nullable 1),
        RmsNormEps = 1e-2, // a hidden state near zero would blow up every rounding
        TieWordEmbeddings = c.Tied,
        QkvBias = c.AttentionBias,
        OutputBias = c.AttentionBias,
        MlpBias = c.MlpBias,
        HiddenAct = (if c.Gelu then Activation.GeluTanh else Activation.Silu),
        QkNorm = extras.QkNorm,
        PostNorms = extras.PostNorms,
        RmsNormUnitOffset = extras.UnitOffset,
        ScaleEmbeddings = extras.ScaleEmbeddings,
        AttnLogitSoftcapping = given extras.CappedScores 2.0,
        FinalLogitSoftcapping = given extras.CappedLogits 3.0,
        QueryPreAttnScalar = given (modelType = "gemma2") 5.0,
        SlidingWindow = given (extras.Window > 0) extras.Window,
        LayerTypes = layerTypes,
        RopeScaling = ropeScaling extras.RopeScaling
    )

let config = configAs "llama"

let private ignored = LinearCrossEntropy.IgnoreIndex

let private random seed n vocabulary =
    (labelsOf seed n vocabulary Every).data<int64>().ToArray()

/// Random documents; a label that counts is the token itself, as in Hugging Face.
let documentsOf (c: DecoderCase) =
    [
        for i, d in List.indexed c.Documents do
            let seed = c.Seed + 100 * i
            let ids = random seed d.Tokens c.Vocabulary
            let mask = (labelsOf seed d.Tokens c.Vocabulary d.Labels).data<int64>().ToArray()
            TokenSequence(ids, Array.map2 (fun id label -> if label = ignored then ignored else id) ids mask)
    ]

let modelOf (c: DecoderCase) =
    new CausalLM(config c, dtype c.Precision)

let options (c: DecoderCase) = ComputeOptions(c.Chunk, c.Recompute)

let otherPolicy policy =
    if policy = RecomputePolicy.None then
        RecomputePolicy.Full
    else
        RecomputePolicy.None

/// Two driven steps are compared exactly: bfloat16 is held against the truth, not against itself.
let exact (c: DecoderCase) =
    if c.Precision = BFloat16 then
        { c with Precision = Float64 }
    else
        c

let private withModel (c: DecoderCase) body =
    inScope (fun () ->
        use model = modelOf c
        prepare c.Seed c.Frozen model
        body model (documentsOf c))

let private scale = 0.25

/// The driven step over micro-batches of packed documents: losses are added up, and so are gradients in <c>.grad</c>.
let driven (model: CausalLM) options (batches: TokenSequence list list) : Outcome =
    clear model

    let step documents =
        use batch = new TokenBatch(documents)
        let loss = model.ForwardBackward(batch, scale, options)
        let score = model.Evaluate(batch, options)

        [
            loss.LossSum.item<float>()
            float loss.TokenCount
            score.LossSum
            float score.TargetCount
            float score.Correct
        ]

    let sums = batches |> List.map step |> List.reduce (List.map2 (+))

    let named =
        List.map2
            (fun name (x: float) -> name, Some(torch.tensor x))
            [ "loss"; "tokens"; "evaluated loss"; "evaluated tokens"; "correct" ]
            sums

    named @ gradientsOf model

/// Without the count of correct predictions, which a rounding may turn.
let sums = List.filter (fst >> (<>) "correct")

/// The same through one graph a document, with nothing packed and nothing cut.
let plain (model: CausalLM) recompute (documents: TokenSequence list) : Outcome =
    clear model

    let loss (d: TokenSequence) =
        PlainDecoder.LossSum(
            model,
            (torch.tensor d.InputIds).unsqueeze 0,
            (torch.tensor d.Labels).unsqueeze 0,
            recompute
        )

    let total =
        documents
        |> List.map (fun d -> (loss d).to_type torch.float64)
        |> List.reduce (fun a b -> a + b)

    if total.requires_grad then
        total.mul(scale.ToScalar()).backward()

    let sum, count =
        Some(total.detach ()), Some(torch.tensor (documents |> List.sumBy (fun d -> float d.TargetCount)))

    [
        "loss", sum
        "tokens", count
        "evaluated loss", sum
        "evaluated tokens", count
    ]
    @ gradientsOf model

[<Property>]
let ``a driven step equals the plain graph`` (c: DecoderCase) =
    withModel c (fun model documents ->
        let plain dtype =
            use other = new CausalLM(config c, dtype)
            copy model other
            plain other false documents

        agreeWithTruth c.Precision (sums (driven model (options c) [ documents ])) plain)

[<Property>]
let ``the plain graph does not depend on recomputation`` (c: DecoderCase) =
    let c = exact c

    withModel c (fun model documents -> agree c.Precision (plain model true documents) (plain model false documents))

[<Property>]
let ``a driven step does not depend on its chunk or on what is kept`` (c: DecoderCase) (Chunk other) =
    let c = exact c

    withModel c (fun model documents ->
        let step options =
            driven model options [ documents ] |> sums

        agree c.Precision (step (options c)) (step (ComputeOptions(other, otherPolicy c.Recompute))))

/// The numbers of both forms are the same, to the bit.
let private identical (got: Outcome) (want: Outcome) =
    let equal a b =
        match a, b with
        | Some(a: Tensor), Some(b: Tensor) -> a.equal(b).all().item<bool>()
        | a, b -> a.IsNone && b.IsNone

    List.forall2 (fun (name, a) (other, b) -> name = other && equal a b) got want

[<Property>]
let ``a driven step does not depend on where inputs wait for backward`` (c: DecoderCase) =
    withModel c (fun model documents ->
        let step folder =
            driven model (ComputeOptions(c.Chunk, c.Recompute, 0, folder)) [ documents ]

        identical (step (System.IO.Path.GetTempPath())) (step null))

[<Property>]
let ``gradients are complete when they are said to be`` (c: DecoderCase) =
    withModel c (fun model documents ->
        let want = driven model (options c) [ documents ]
        let want = want |> List.skip (want.Length - (gradientsOf model).Length)

        clear model
        use batch = new TokenBatch(documents)
        let told = System.Collections.Generic.Dictionary<nativeint, Tensor option>()

        // As an optimizer does: the gradient goes, and the weight is another one.
        let completed _ (parameters: seq<Modules.Parameter>) =
            use _ = torch.no_grad ()

            for p in parameters do
                told.Add(p.Handle, gradient p |> Option.map _.DetachFromDisposeScope())
                p.grad <- null
                p.fill_ (nan.ToScalar()) |> ignore

        use _ =
            model.ForwardBackward(batch, scale, options c, completed = GradientsCompleted completed)

        let got: Outcome =
            [
                for struct (name, p) in model.named_parameters () ->
                    name, (if told.ContainsKey p.Handle then told[p.Handle] else None)
            ]

        identical got want && List.forall (snd >> Option.isNone) (gradientsOf model))

[<Property>]
let ``micro-batches add up to one batch`` (c: DecoderCase) (NonNegativeInt cut) =
    let c = exact c

    withModel c (fun model documents ->
        let first, rest = List.splitAt (1 + cut % documents.Length) documents
        let batches = first :: List.map List.singleton rest
        agree c.Precision (sums (driven model (options c) batches)) (sums (driven model (options c) [ documents ])))

/// The tokens of a document, with no label that counts.
let private silent (d: TokenSequence) =
    TokenSequence(d.InputIds, Array.replicate d.Length ignored)

[<Property>]
let ``neighbours in a batch do not change a document`` (c: DecoderCase) (NonNegativeInt which) =
    let c = exact c

    withModel c (fun model documents ->
        let at = which % documents.Length
        let packed = documents |> List.mapi (fun i d -> if i = at then d else silent d)

        agree
            c.Precision
            (sums (driven model (options c) [ packed ]))
            (sums (driven model (options c) [ [ documents[at] ] ])))

[<Property>]
let ``padding without labels does not change a document`` (c: DecoderCase) (PositiveInt padding) =
    let c = exact c

    withModel c (fun model documents ->
        let pad (d: TokenSequence) =
            let tokens = random (c.Seed + 1) padding c.Vocabulary
            TokenSequence(Array.append d.InputIds tokens, Array.append d.Labels (Array.replicate padding ignored))

        agree
            c.Precision
            (sums (driven model (options c) [ List.map pad documents ]))
            (sums (driven model (options c) [ documents ])))

[<Property>]
let ``a step adds to the gradients that are there`` (c: DecoderCase) =
    let c = exact c

    withModel c (fun model documents ->
        let once = driven model (options c) [ documents ] |> sums
        let twice = driven model (options c) [ documents; documents ] |> sums
        agree c.Precision twice [ for name, t in once -> name, Option.map (fun t -> t + t) t ])

[<Property>]
let ``logits equal those of the plain graph`` (c: DecoderCase) =
    withModel c (fun model documents ->
        let outcome (form: Tensor -> Tensor) : Outcome =
            [
                for i, d in List.indexed documents ->
                    $"logits of document {i}", Some(form((torch.tensor d.InputIds).unsqueeze 0).detach())
            ]

        let plain dtype =
            use other = new CausalLM(config c, dtype)
            copy model other
            outcome (fun ids -> PlainDecoder.Logits(other, ids))

        agreeWithTruth c.Precision (outcome model.call) plain)
