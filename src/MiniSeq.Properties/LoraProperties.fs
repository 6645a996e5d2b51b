/// What holds for a model with a LoRA adapter, wherever it sits and however a step is cut.
[<FsCheck.Xunit.Properties(Arbitrary = [| typeof<MiniSeq.Properties.Generators.Cases> |], MaxTest = 60)>]
module MiniSeq.Properties.LoraProperties

open FsCheck
open FsCheck.FSharp
open FsCheck.Xunit
open TorchSharp
open MiniSeq.Layers
open MiniSeq.Models
open MiniSeq.Properties.Generators
open MiniSeq.Properties.Forms
open MiniSeq.Properties.DecoderProperties

let private adapter (c: LoraCase) dropout =
    LoraConfig(
        R = c.Rank,
        LoraAlpha = c.Alpha,
        UseRslora = c.Rslora,
        TargetModules = ResizeArray c.Targets,
        LoraDropout = dropout
    )

let private modelIn (c: LoraCase) dropout dtype =
    let model = new CausalLM(config c.Decoder, dtype)
    model.AddAdapter(adapter c dropout)
    model

/// An adapter far from zero, and what is trained.
let private prepared (c: LoraCase) dropout dtype =
    let model = modelIn c dropout dtype
    prepare c.Decoder.Seed [] model

    for struct (name, p) in model.named_parameters () do
        p.requires_grad <- c.BaseTrained || name.Contains "lora_"

    model

let private exactly (c: LoraCase) = { c with Decoder = exact c.Decoder }

/// Logits and losses, without gradients.
let private results (c: LoraCase) (model: CausalLM) : Outcome =
    let documents = documentsOf c.Decoder

    let step =
        driven model (options c.Decoder) [ documents ]
        |> List.filter (fun (name, _) -> name = "loss" || name = "evaluated loss")

    step
    @ [
        for i, d in List.indexed documents ->
            $"logits of document {i}", Some(model.call ((torch.tensor d.InputIds).unsqueeze 0))
    ]

[<Property>]
let ``an adapter whose B is zero changes nothing`` (c: LoraCase) =
    inScope (fun () ->
        use model = new CausalLM(config c.Decoder, dtype c.Decoder.Precision)
        prepare c.Decoder.Seed [] model
        let before = results c model
        model.AddAdapter(adapter c 0.0)
        agreeWithin 0.0 (results c model) before)

[<Property>]
let ``a merged adapter gives what it gave before`` (c: LoraCase) =
    let c = exactly c

    let c =
        if c.Decoder.Tied then
            // One matrix cannot take what is for one of its two uses.
            { c with
                Targets = "o_proj" :: List.except [ "o_proj"; "embed_tokens"; "lm_head" ] c.Targets
            }
        else
            c

    inScope (fun () ->
        use model = prepared c 0.0 (dtype c.Decoder.Precision)
        let before = results c model
        model.MergeAdapter()
        let none = isNull model.Adapter && model.parameters () |> Seq.forall _.requires_grad

        agree c.Decoder.Precision (results c model) before
        .&. (none |> Prop.label "something of the adapter is left"))

[<Property>]
let ``a driven step with an adapter equals the plain graph`` (c: LoraCase) =
    inScope (fun () ->
        use model = prepared c 0.0 (dtype c.Decoder.Precision)
        let documents = documentsOf c.Decoder

        let plain dtype =
            use other = modelIn c 0.0 dtype
            copy model other
            plain other false documents

        agreeWithTruth c.Decoder.Precision (sums (driven model (options c.Decoder) [ documents ])) plain)

[<Property>]
let ``dropout depends neither on the chunk nor on what is kept`` (c: LoraCase) (Chunk other) =
    let c = exactly c

    inScope (fun () ->
        use model = prepared c 0.3 (dtype c.Decoder.Precision)

        let step options =
            torch.random.manual_seed (int64 c.Decoder.Seed) |> ignore
            driven model options [ documentsOf c.Decoder ] |> sums

        agree
            c.Decoder.Precision
            (step (options c.Decoder))
            (step (ComputeOptions(other, otherPolicy c.Decoder.Recompute))))
