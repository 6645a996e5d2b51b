/// Random cases as records of plain numbers: they print as what to type in, and shrink field by field.
module MiniSeq.Properties.Generators

open FsCheck
open FsCheck.FSharp
open MiniSeq.Models

type Precision =
    | Float64
    | Float32
    | BFloat16

/// Which of n labels count; the others are ignored.
type Labels =
    | Every
    | Nothing
    | Single of at: int
    /// About so many in ten.
    | Scattered of tenths: int

/// The input of a row-wise layer, [batch, length, hidden], and how it is cut.
type Rows =
    {
        Batch: int
        Length: int
        Hidden: int
        /// Rows of a mini-sequence; 0 is automatic.
        Chunk: int
        Precision: Precision
        InputFrozen: bool
        /// Seen through a transposed view, so not contiguous.
        Transposed: bool
        Seed: int
    }

/// The chunk of a second form.
type Chunk = Chunk of int

type MlpCase =
    {
        Rows: Rows
        Intermediate: int
        Gelu: bool
        Bias: bool
        /// Parameters whose name contains one of these.
        Frozen: string list
    }

type HeadCase =
    {
        Rows: Rows
        Vocabulary: int
        Labels: Labels
        Bias: bool
        /// Whether logits are capped.
        Capped: bool
        Frozen: string list
        /// The gradient that arrives at the loss.
        Upstream: float
    }

type AttentionCase =
    {
        KvHeads: int
        /// Query heads of a key/value head.
        Groups: int
        HeadDim: int
        Lengths: int list
        Scale: float
        /// Tokens that a token sees; 0 is all before it.
        Window: int
        /// Whether scores are capped.
        Capped: bool
        /// Rows of a tile of scores, and its columns.
        Tile: int * int
        Precision: Precision
        Seed: int
    }

type Document = { Tokens: int; Labels: Labels }

type Extras =
    {
        QkNorm: bool
        PostNorms: bool
        UnitOffset: bool
        ScaleEmbeddings: bool
        CappedScores: bool
        CappedLogits: bool
        /// Tokens that a token sees; 0 is all before it.
        Window: int
        /// Every other layer sees everything.
        Alternate: bool
        /// None, linear, Llama 3.1's, YaRN.
        RopeScaling: int
    }

type DecoderCase =
    {
        Layers: int
        KvHeads: int
        Groups: int
        HalfHeadDim: int
        Hidden: int
        Intermediate: int
        Vocabulary: int
        Tied: bool
        AttentionBias: bool
        MlpBias: bool
        Gelu: bool
        /// What Gemma 2 and Qwen3 have and Llama has not.
        Extras: Extras
        Documents: Document list
        Frozen: string list
        Chunk: int
        Recompute: RecomputePolicy
        Precision: Precision
        Seed: int
    }

type LoraCase =
    {
        Decoder: DecoderCase
        Rank: int
        Alpha: float
        Rslora: bool
        Targets: string list
        /// Whether the parameters below the adapter are trained, too.
        BaseTrained: bool
    }

/// A network whose blocks may be recomputed, each as a function or as a module.
type Step =
    | Linear
    | Gelu
    | Dropout
    | Function of Step list
    | Module of Step list

type NetworkCase =
    {
        Steps: Step list
        Rows: Rows
        Frozen: string list
    }

/// A head wide enough that logits of all rows would dwarf everything else.
type MemoryCase =
    {
        Chunk: int
        Chunks: int
        Hidden: int
        Vocabulary: int
        Precision: Precision
    }

let private flag = Gen.elements [ false; true ]
let private seed = Gen.choose (0, 9999)
let private precision = Gen.elements [ Float64; Float32; BFloat16 ]

let private sublist names =
    Gen.oneof [ Gen.constant []; Gen.subListOf names |> Gen.map List.ofSeq ]

let private labels =
    Gen.frequency
        [
            2, Gen.constant Every
            1, Gen.constant Nothing
            1, Gen.map Single (Gen.choose (0, 20))
            3, Gen.map Scattered (Gen.choose (1, 9))
        ]

/// 1, a few, more than there are, automatic; few of them divide the rows.
let private chunk =
    Gen.frequency
        [
            1, Gen.constant 0
            2, Gen.constant 1
            6, Gen.choose (2, 9)
            1, Gen.choose (10, 60)
        ]

let private rows =
    gen {
        let! batch = Gen.choose (1, 3)
        let! length = Gen.choose (1, 13)
        let! hidden = Gen.choose (1, 7)
        let! chunk = chunk
        let! precision = precision
        let! frozen = Gen.frequency [ 4, Gen.constant false; 1, Gen.constant true ]
        let! transposed = flag
        let! seed = seed

        return
            {
                Batch = batch
                Length = length
                Hidden = hidden
                Chunk = chunk
                Precision = precision
                InputFrozen = frozen
                Transposed = transposed
                Seed = seed
            }
    }

/// Rows and a width, or now and then so many and so wide that the automatic chunk is smaller than the rows.
let private rowsAndWidth widest =
    let small = Gen.zip rows (Gen.choose (1, widest))

    let automatic =
        gen {
            let! rows = rows
            let! length = Gen.choose (257, 300)

            return
                { rows with
                    Length = length
                    Hidden = 2
                    Chunk = 0
                },
                4096
        }

    Gen.frequency [ 39, small; 1, automatic ]

let private validRows (r: Rows) =
    r.Batch > 0 && r.Length > 0 && r.Hidden > 0 && r.Chunk >= 0 && r.Seed >= 0

let private known names =
    List.forall (fun name -> List.contains name names)

let private mlpNames =
    [
        for p in [ "gate_proj"; "up_proj"; "down_proj" ] do
            for part in [ "weight"; "bias" ] -> $"{p}.{part}"
    ]

let private mlp =
    gen {
        let! rows, intermediate = rowsAndWidth 11
        let! gelu = flag
        let! bias = flag
        let! frozen = sublist mlpNames

        return
            {
                Rows = rows
                Intermediate = intermediate
                Gelu = gelu
                Bias = bias
                Frozen = frozen
            }
    }

let private headNames = [ "weight"; "bias" ]

let private head =
    gen {
        let! rows, vocabulary = rowsAndWidth 17
        let! labels = labels
        let! bias = flag
        let! capped = flag
        let! frozen = sublist headNames
        let! upstream = Gen.elements [ 1.0; -0.5; 0.01; 7.0; 0.0 ]

        return
            {
                Rows = rows
                Vocabulary = vocabulary
                Labels = labels
                Bias = bias
                Capped = capped
                Frozen = frozen
                Upstream = upstream
            }
    }

/// None, or a few tokens, of which some are more than there are.
let private window = Gen.frequency [ 1, Gen.constant 0; 2, Gen.choose (1, 14) ]

/// Small heads in exact types, and in bfloat16 heads and documents that fill several tiles of the kernel.
let private attention =
    gen {
        let! kvHeads = Gen.choose (1, 3)
        let! groups = Gen.choose (1, 3)

        let! precision =
            Gen.frequency [ 2, Gen.elements [ Float64; Float32 ]; 1, Gen.constant BFloat16 ]

        let wide = precision = BFloat16

        let! headDim =
            if wide then
                Gen.elements [ 16; 32; 48; 64; 80; 128 ]
            else
                Gen.choose (1, 9)

        let! documents = Gen.choose (1, 4)

        let length =
            if wide then
                [ 2, Gen.choose (1, 20); 2, Gen.choose (100, 300); 1, Gen.choose (500, 600) ]
            else
                [ 9, Gen.choose (1, 12); 1, Gen.choose (30, 80) ]

        let! lengths = Gen.listOfLength documents (Gen.frequency length)
        let! scale = Gen.elements [ 1.0; 0.3; 0.1 ]

        let! window =
            if wide then
                Gen.oneof [ window; Gen.choose (1, 500) ]
            else
                window

        let! capped = flag
        let! tile = Gen.zip (Gen.choose (1, 20)) (Gen.choose (1, 20))
        let! seed = seed

        return
            {
                KvHeads = kvHeads
                Groups = groups
                HeadDim = headDim
                Lengths = lengths
                Scale = scale
                Window = window
                Capped = capped
                Tile = tile
                Precision = precision
                Seed = seed
            }
    }

let private decoderNames =
    [
        "embed_tokens"
        "input_layernorm"
        "q_proj"
        "k_proj"
        "v_proj"
        "o_proj"
        "bias"
        "post_attention_layernorm"
        "q_norm"
        "pre_feedforward_layernorm"
        "post_feedforward_layernorm"
        "gate_proj"
        "up_proj"
        "down_proj"
        "layers.0"
        "model.norm"
        "lm_head"
    ]

let private extras =
    gen {
        let! qkNorm = flag
        let! postNorms = flag
        let! unitOffset = flag
        let! scaleEmbeddings = flag
        let! cappedScores = flag
        let! cappedLogits = flag
        let! window = window
        let! alternate = flag
        let! ropeScaling = Gen.choose (0, 3)

        return
            {
                QkNorm = qkNorm
                PostNorms = postNorms
                UnitOffset = unitOffset
                ScaleEmbeddings = scaleEmbeddings
                CappedScores = cappedScores
                CappedLogits = cappedLogits
                Window = window
                Alternate = alternate
                RopeScaling = ropeScaling
            }
    }

let noExtras =
    {
        QkNorm = false
        PostNorms = false
        UnitOffset = false
        ScaleEmbeddings = false
        CappedScores = false
        CappedLogits = false
        Window = 0
        Alternate = false
        RopeScaling = 0
    }

let private document =
    Gen.map2 (fun n l -> { Tokens = n; Labels = l }) (Gen.choose (1, 12)) labels

let private decoder =
    gen {
        let! layers = Gen.choose (1, 3)
        let! kvHeads = Gen.choose (1, 2)
        let! groups = Gen.choose (1, 3)
        let! halfHeadDim = Gen.choose (1, 3)
        let! hidden = Gen.choose (2, 9)
        let! intermediate = Gen.choose (1, 13)
        let! vocabulary = Gen.choose (2, 23)
        let! tied = flag
        let! attentionBias = flag
        let! mlpBias = flag
        let! gelu = flag
        let! extras = Gen.frequency [ 1, Gen.constant noExtras; 2, extras ]
        let! documents = Gen.choose (1, 4)
        let! documents = Gen.listOfLength documents document
        let! frozen = sublist decoderNames
        let! chunk = chunk

        let! recompute =
            Gen.elements
                [
                    RecomputePolicy.Full
                    RecomputePolicy.KeepAttention
                    RecomputePolicy.None
                    RecomputePolicy.Auto
                ]

        // Next to nothing under a norm, a rounding of bfloat16 becomes a change of sign, and each of these multiplies the occasions: the
        // layers' own properties hold them in bfloat16.
        let! precision =
            if extras = noExtras then
                precision
            else
                Gen.elements [ Float64; Float32 ]

        let! seed = seed

        return
            {
                Layers = layers
                KvHeads = kvHeads
                Groups = groups
                HalfHeadDim = halfHeadDim
                Hidden = hidden
                Intermediate = intermediate
                Vocabulary = vocabulary
                Tied = tied
                AttentionBias = attentionBias
                MlpBias = mlpBias
                Gelu = gelu
                Extras = extras
                Documents = documents
                Frozen = frozen
                Chunk = chunk
                Recompute = recompute
                Precision = precision
                Seed = seed
            }
    }

let private validDecoder (c: DecoderCase) =
    let sizes =
        [
            c.Layers
            c.KvHeads
            c.Groups
            c.HalfHeadDim
            c.Hidden - 1
            c.Intermediate
            c.Vocabulary - 1
        ]

    List.forall (fun n -> n > 0) (sizes @ [ for d in c.Documents -> d.Tokens ])
    && not c.Documents.IsEmpty
    && c.Chunk >= 0
    && c.Seed >= 0
    && c.Extras.Window >= 0
    && List.contains c.Extras.RopeScaling [ 0..3 ]
    && (c.Precision <> BFloat16 || c.Extras = noExtras)
    && known decoderNames c.Frozen

let private loraTargets =
    [
        "q_proj"
        "k_proj"
        "v_proj"
        "o_proj"
        "gate_proj"
        "up_proj"
        "down_proj"
        "embed_tokens"
        "lm_head"
    ]

let private lora =
    gen {
        let! decoder = decoder |> Gen.filter (fun c -> c.Precision <> BFloat16)
        let! rank = Gen.choose (1, 5)
        let! alpha = Gen.elements [ 0.5; 1.0; 2.0 ]
        let! rslora = Gen.elements [ false; true ]
        let! first = Gen.elements loraTargets
        let! others = Gen.subListOf loraTargets
        let! baseTrained = Gen.elements [ false; true ]

        return
            {
                Decoder = decoder
                Rank = rank
                Alpha = alpha
                Rslora = rslora
                Targets = List.distinct (first :: List.ofSeq others)
                BaseTrained = baseTrained
            }
    }

let private validLora (c: LoraCase) =
    validDecoder c.Decoder
    && c.Rank > 0
    && System.Double.IsFinite c.Alpha
    && not c.Targets.IsEmpty
    && c.Decoder.Precision <> BFloat16
    && known loraTargets c.Targets

let private step =
    let leaf = Gen.elements [ Linear; Gelu; Dropout ]

    let rec tree depth =
        let block =
            Gen.choose (0, 3) |> Gen.bind (fun n -> Gen.listOfLength n (tree (depth - 1)))

        if depth = 0 then
            leaf
        else
            Gen.frequency [ 3, leaf; 1, Gen.map Function block; 1, Gen.map Module block ]

    tree 3

let private network =
    gen {
        let! steps = Gen.choose (1, 5)
        let! steps = Gen.listOfLength steps step
        let! rows = rows
        let! frozen = sublist [ "weight"; "bias" ]

        return
            {
                Steps = steps
                Rows = rows
                Frozen = frozen
            }
    }

let private memory =
    gen {
        let! chunk = Gen.choose (8, 32)
        let! chunks = Gen.choose (12, 20)
        let! hidden = Gen.choose (1, 16)
        let! vocabulary = Gen.choose (1000, 2000)
        let! precision = precision

        return
            {
                Chunk = chunk
                Chunks = chunks
                Hidden = hidden
                Vocabulary = vocabulary
                Precision = precision
            }
    }

let private validMemory c =
    c.Chunk >= 8 && c.Chunks >= 12 && c.Hidden > 0 && c.Vocabulary >= 1000

/// The shrinker that FsCheck derives from the record, held to the valid cases.
let shrinking valid (gen: Gen<'T>) =
    let derived = ArbMap.defaults |> ArbMap.arbitrary<'T> |> Arb.toShrink
    Arb.fromGenShrink (gen, derived >> Seq.filter valid)

/// Registered by <c>[<Properties(Arbitrary = ..)>]</c>.
type Cases =
    static member Mlp() =
        mlp
        |> shrinking (fun c -> validRows c.Rows && c.Intermediate > 0 && known mlpNames c.Frozen)

    static member Head() =
        head
        |> shrinking (fun c -> validRows c.Rows && c.Vocabulary > 0 && known headNames c.Frozen)

    static member Attention() =
        attention
        |> shrinking (fun c ->
            not c.Lengths.IsEmpty
            && c.Window >= 0
            && fst c.Tile > 0
            && snd c.Tile > 0
            && List.forall (fun n -> n > 0) (c.KvHeads :: c.Groups :: c.HeadDim :: c.Lengths))

    static member Decoder() = decoder |> shrinking validDecoder

    static member Lora() = lora |> shrinking validLora

    static member Network() =
        network
        |> shrinking (fun c -> validRows c.Rows && known [ "weight"; "bias" ] c.Frozen)

    static member Memory() = memory |> shrinking validMemory

    static member Chunk() =
        chunk |> Gen.map Chunk |> shrinking (fun (Chunk n) -> n >= 0)

    static member Rows() = rows |> shrinking validRows
