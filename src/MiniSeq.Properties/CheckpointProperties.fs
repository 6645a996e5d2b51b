/// What is written and read again is the same: tensors, texts, models.
[<FsCheck.Xunit.Properties(Arbitrary =
                               [|
                                   typeof<MiniSeq.Properties.Generators.Cases>
                                   typeof<MiniSeq.Properties.CheckpointGenerators.CheckpointCases>
                               |],
                           MaxTest = 100)>]
module MiniSeq.Properties.CheckpointProperties

open System.Collections
open System.IO
open FsCheck
open FsCheck.FSharp
open FsCheck.Xunit
open TorchSharp
open MiniSeq.Models
open MiniSeq.Properties.Generators
open MiniSeq.Properties.CheckpointGenerators
open MiniSeq.Properties.Forms

let private inFolder (body: string -> 'T) =
    let folder = Directory.CreateTempSubdirectory "miniseq-"

    try
        body folder.FullName
    finally
        folder.Delete true

let private scalarType =
    function
    | F64 -> torch.ScalarType.Float64
    | F32 -> torch.ScalarType.Float32
    | F16 -> torch.ScalarType.Float16
    | BF16 -> torch.ScalarType.BFloat16
    | I64 -> torch.ScalarType.Int64
    | I32 -> torch.ScalarType.Int32
    | I16 -> torch.ScalarType.Int16
    | I8 -> torch.ScalarType.Int8
    | U8 -> torch.ScalarType.Byte
    | BOOL -> torch.ScalarType.Bool

let private bytesOf (t: Tensor) =
    if t.numel () = 0L then
        [||]
    else
        t.detach().contiguous().bytes.ToArray()

/// Any bits, so NaNs and infinities too; a bool has only two values.
let private tensorOf (random: System.Random) (t: StoredTensor) =
    let dtype = scalarType t.Type
    let shape = Array.ofList (List.map int64 t.Shape)
    let tensor = torch.zeros (shape, dtype = dtype)

    if tensor.numel () > 0L then
        let bytes = Array.zeroCreate<byte> tensor.bytes.Length
        random.NextBytes bytes

        let bytes =
            if t.Type = BOOL then
                Array.map (fun b -> b &&& 1uy) bytes
            else
                bytes

        System.MemoryExtensions.CopyTo(bytes, tensor.bytes)

    if t.Transposed && shape.Length > 1 then
        tensor.transpose (0, -1)
    else
        tensor

let private tensorsOf (c: FileCase) =
    let random = System.Random c.Seed
    [| for t in c.Tensors -> struct (t.Name, tensorOf random t) |]

let private described (tensors: seq<struct (string * Tensor)>) =
    set
        [
            for struct (name, t) in tensors -> name, t.dtype, List.ofArray t.shape, bytesOf t
        ]

/// What a reader says of its tensors, and gives.
let private contents (reader: SafetensorsReader) =
    let tensors =
        [
            for name in reader.Names ->
                let t = reader.Read name

                if t.dtype <> reader.DType name || t.shape <> reader.Shape name then
                    failwith $"'{name}' is read as {t.dtype} {t.shape}"

                struct (name, t)
        ]

    described tensors, Map [ for entry in reader.Metadata -> entry.Key, entry.Value ]

let private readBack path =
    use reader = SafetensorsReader.Open path
    contents reader

let private unsaid = Map [ "format", "pt" ]

[<Property>]
let ``a safetensors file gives back names, types, shapes, bytes and metadata`` (c: FileCase) =
    inScope (fun () ->
        inFolder (fun folder ->
            let tensors, path = tensorsOf c, Path.Combine(folder, "any.safetensors")

            let metadata = c.Metadata |> Option.map (fun m -> readOnlyDict m) |> Option.toObj

            SafetensorsWriter.Save(path, tensors, metadata)
            let wanted = c.Metadata |> Option.map Map |> Option.defaultValue unsaid
            let written = File.ReadAllBytes path
            SafetensorsWriter.Save(path, Array.rev tensors, metadata)

            (readBack path = (described tensors, wanted))
            |> Prop.label "reads the same"
            |> Prop.classify (tensors.Length = 0) "no tensor"
            .&. ((File.ReadAllBytes path = written)
                 |> Prop.label "the order of the tensors does not matter")))

[<Property>]
let ``shards give back names, types, shapes and bytes`` (c: FileCase) =
    inScope (fun () ->
        inFolder (fun folder ->
            let tensors = tensorsOf c
            // Files of an earlier save, in shards or whole, must be gone.
            let old = [| for i in 1..3 -> struct ($"old {i}", torch.zeros 9L) |]
            SafetensorsWriter.SavePretrained(folder, old, (if c.Seed % 2 = 0 then 8L else 800L))
            SafetensorsWriter.SavePretrained(folder, tensors, int64 c.ShardBytes)
            let files = Directory.GetFiles(folder, "*.safetensors")
            let names = set (List.map _.Name c.Tensors)

            let known path =
                use shard = SafetensorsReader.Open path
                shard.Names |> Seq.forall names.Contains

            let fits path =
                use shard = SafetensorsReader.Open path
                let held = [ for name in shard.Names -> (bytesOf (shard.Read name)).Length ]
                let full = List.filter (fun n -> n > 0) held
                List.sum held <= c.ShardBytes || full.Length = 1

            (readBack folder = (described tensors, unsaid))
            |> Prop.label "reads the same"
            |> Prop.classify (files.Length > 1) "several shards"
            .&. (Array.forall known files |> Prop.label "no file of before is left")
            .&. (Array.forall fits files |> Prop.label "no shard is too large")))

/// The case as a family whose config.json has a place for all of it.
let private inFamily (c: DecoderCase) =
    let plain =
        { c with
            AttentionBias = false
            MlpBias = false
            Extras =
                { noExtras with
                    RopeScaling = min 2 c.Extras.RopeScaling
                }
        }

    let sliding =
        { plain with
            Extras =
                { plain.Extras with
                    Window = c.Extras.Window
                }
        }

    match c.Seed % 5 with
    | 0 ->
        "llama",
        { plain with
            AttentionBias = c.AttentionBias
            MlpBias = c.MlpBias
        }
    | 1 -> "mistral", sliding
    | 2 -> "phi3", sliding
    | 3 ->
        "qwen3",
        { sliding with
            AttentionBias = c.AttentionBias
            Extras =
                { sliding.Extras with
                    QkNorm = true
                    Alternate = c.Extras.Alternate
                }
        }
    | _ ->
        "gemma2",
        { c with
            MlpBias = false
            Extras =
                { c.Extras with
                    QkNorm = false
                    PostNorms = true
                    UnitOffset = true
                    ScaleEmbeddings = true
                    RopeScaling = sliding.Extras.RopeScaling
                }
        }

[<Property>]
let ``a checkpoint gives back the configuration, every weight and the logits``
    (c: DecoderCase)
    (PositiveInt shardBytes)
    =
    let family, c = inFamily c

    let values (config: DecoderConfig) =
        ("windows", [ for layer in 0 .. config.NumHiddenLayers - 1 -> box (config.WindowOf layer) ])
        :: [
            for p in typeof<DecoderConfig>.GetProperties() do
                if p.Name <> nameof config.LayerTypes then
                    match p.GetValue config with
                    | :? string as text -> p.Name, [ box text ]
                    | :? IEnumerable as many -> p.Name, List.ofSeq (Seq.cast<obj> many)
                    | value -> p.Name, [ value ]
        ]

    let weights (model: CausalLM) dtype =
        described
            [
                for struct (name, p) in model.named_parameters () -> struct (name, p.to_type dtype)
            ]

    inScope (fun () ->
        inFolder (fun folder ->
            use model = new CausalLM(DecoderProperties.configAs family c, dtype c.Precision)
            prepare c.Seed [] model
            model.SavePretrained(folder, int64 shardBytes * 20L)
            use loaded = Checkpoint.LoadPretrained folder
            use widened = Checkpoint.LoadPretrained(folder, torch.ScalarType.Float64)

            let logits (m: CausalLM) =
                [
                    for d in DecoderProperties.documentsOf c ->
                        bytesOf (m.call ((torch.tensor d.InputIds).unsqueeze 0))
                ]

            ((values model.Config = values loaded.Config) |> Prop.label "configuration")
            .&. ((model.DType = loaded.DType && widened.DType = torch.ScalarType.Float64)
                 |> Prop.label "type")
            .&. ((weights model model.DType = weights loaded model.DType) |> Prop.label "weights")
            .&. ((weights model torch.ScalarType.Float64 = weights widened torch.ScalarType.Float64)
                 |> Prop.label "weights in float64")
            .&. ((logits model = logits loaded) |> Prop.label "logits")))
