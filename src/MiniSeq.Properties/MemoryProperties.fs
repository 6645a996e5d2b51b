/// The memory plan against the measured peak of a driven step.
module MiniSeq.Properties.MemoryProperties

open Xunit
open FsCheck
open FsCheck.FSharp
open TorchSharp
open MiniSeq.Layers
open MiniSeq.Models

type MemoryCase =
    {
        Config: DecoderConfig
        Type: torch.ScalarType
        /// Tokens of each document; below some hundreds, buffers that the plan does not count are not small beside the rest.
        Length: int
        Documents: int
        /// Labels at the end of each.
        Targets: int
        Compute: ComputeOptions
        /// Rank of an adapter; 0 is none.
        Rank: int
    }

let private maybe value =
    Gen.frequency [ 2, Gen.constant (System.Nullable()); 1, Gen.map System.Nullable value ]

let private config =
    gen {
        let! kvHeads = Gen.elements [ 1; 2; 4 ]
        let! groups = Gen.elements [ 1; 2; 4 ]
        let! headDim = Gen.elements [ 16; 32; 64 ]
        let! hidden = Gen.choose (4, 32)
        let! intermediate = Gen.choose (4, 100)
        let! vocabulary = Gen.choose (100, 6000)
        let! layers = Gen.choose (1, 4)
        let! window = maybe (Gen.choose (16, 1000))
        let! scoreCap = maybe (Gen.constant 30.0)
        let! logitCap = maybe (Gen.constant 30.0)
        let! flags = Gen.listOfLength 6 (Gen.elements [ false; true ])

        return
            DecoderConfig(
                VocabSize = vocabulary,
                HiddenSize = 8 * hidden,
                IntermediateSize = 8 * intermediate,
                NumHiddenLayers = layers,
                NumAttentionHeads = kvHeads * groups,
                NumKeyValueHeads = kvHeads,
                HeadDim = headDim,
                SlidingWindow = window,
                AttnLogitSoftcapping = scoreCap,
                FinalLogitSoftcapping = logitCap,
                TieWordEmbeddings = flags[0],
                QkNorm = flags[1],
                PostNorms = flags[2],
                RmsNormUnitOffset = flags[3],
                QkvBias = flags[4],
                MlpBias = flags[5]
            )
    }

let private case =
    gen {
        let! config = config
        let! dtype = Gen.elements [ torch.ScalarType.Float32; torch.ScalarType.BFloat16 ]
        let! length = Gen.choose (500, 1200)
        let! documents = Gen.elements [ 1; 1; 3 ]
        let! labelled = Gen.elements [ 1.0; 0.5; 0.05 ]
        let! chunk = Gen.elements [ 0; 32; 128; 512; 5000 ]

        let! keeps =
            Gen.elements [ RecomputePolicy.Full; RecomputePolicy.KeepAttention; RecomputePolicy.None ]

        let! budget = maybe (Gen.elements [ 0L; 10_000_000L; 100_000_000L ])
        let! rank = Gen.elements [ 0; 0; 8 ]

        return
            {
                Config = config
                Type = dtype
                Length = length
                Documents = documents
                Targets = int (float (length - 1) * labelled)
                Compute = ComputeOptions(chunk, keeps, budget)
                Rank = rank
            }
    }

let private training (c: MemoryCase) =
    TrainingMemory(Adapter = (if c.Rank > 0 then LoraConfig(R = c.Rank) else null))

let private step (model: CausalLM) (c: MemoryCase) length =
    use _ = torch.NewDisposeScope()
    let ids = [| for i in 0 .. length - 1 -> int64 (7 * i % c.Config.VocabSize) |]

    let labels =
        ids
        |> Array.mapi (fun i id ->
            if i < length - c.Targets then
                LinearCrossEntropy.IgnoreIndex
            else
                id)

    use batch = new TokenBatch(List.replicate c.Documents (TokenSequence(ids, labels)))
    model.ForwardBackward(batch, 1.0, c.Compute).Dispose()

let private measured (c: MemoryCase) =
    use model = new CausalLM(c.Config, c.Type)

    match (training c).Adapter with
    | null -> ()
    | adapter -> model.AddAdapter adapter

    step model c 8 // makes the gradients
    System.GC.Collect()
    System.GC.WaitForPendingFinalizers()
    let before = TensorMemory.LiveBytes
    TensorMemory.ResetPeak()
    step model c c.Length
    TensorMemory.PeakBytes - before

let private planned (c: MemoryCase) =
    let one = BatchShape.Document(c.Length, c.Targets)
    let n = int64 c.Documents

    let batch =
        BatchShape(n * one.Rows, n * one.Targets, n * one.WantedRows, one.LongestDocument, c.Documents)

    MemoryPlan(c.Config, batch, c.Type, c.Compute, training c).PeakBytes

/// Of a thousand cases 13 were more than 10% off, and the worst 19%: models of some thousand numbers, where buffers that the plan does not count are not small.
let private bound = 0.2

let private predicts (c: MemoryCase) =
    let measured, planned = measured c, planned c

    abs (float planned / float measured - 1.0) <= bound
    |> Prop.label $"planned {planned}, measured {measured}"

[<Fact>]
let ``the plan of any model and batch is near the measured peak`` () =
    Assert.SkipUnless(TensorMemory.StartCounting(), "no exact counter here")
    Check.One(Config.QuickThrowOnFailure.WithMaxTest 30, Prop.forAll (Arb.fromGen case) predicts)
