/// What a byte-level tokenizer encodes it decodes to the same text, whole and token by token.
[<FsCheck.Xunit.Properties(Arbitrary = [| typeof<MiniSeq.Properties.CheckpointGenerators.CheckpointCases> |],
                           MaxTest = 300)>]
module MiniSeq.Properties.TextProperties

open System.IO
open System.Text
open System.Text.Json
open System.Text.Json.Nodes
open System.Text.RegularExpressions
open FsCheck.FSharp
open FsCheck.Xunit
open MiniSeq.Models
open MiniSeq.Properties.CheckpointGenerators

let private bos, eos = "<s>", "</s>"
let private specials = Regex "</?s>"

let private sample =
    Path.Combine(System.AppContext.BaseDirectory, "tokenizer", "tokenizer.json")

let private load (json: JsonObject) =
    let file = Path.GetTempFileName()

    try
        File.WriteAllText(file, json.ToJsonString())
        HuggingFaceTokenizer.FromFile file
    finally
        File.Delete file

let private parse (json: string) : JsonObject =
    match JsonNode.Parse json with
    | :? JsonObject as found -> found
    | _ -> failwith "no JSON object"

/// The sample's tokenizer, 4096 tokens; it adds no special tokens to a text.
let private ofSample = lazy (HuggingFaceTokenizer.FromFile sample)

/// A tokenizer.json in which a text stands between bos and eos.
let private enclosing =
    """{"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "</s>"}}],
        "special_tokens": {"<s>": {"ids": [0]}, "</s>": {"ids": [1]}}}"""

/// The sample's with that, and with GPT-2's way to cut a text.
let private ofSampleEnclosing =
    lazy
        (let json = parse (File.ReadAllText sample)
         json["post_processor"] <- parse enclosing
         json["pre_tokenizer"] <- parse """{"type": "ByteLevel", "add_prefix_space": false, "use_regex": true}"""
         load json)

/// GPT-2's alphabet: a printable character for each byte.
let private alphabet =
    let printable b =
        b >= 0x21 && b <= 0x7E || b >= 0xA1 && b <= 0xAC || b >= 0xAE

    let others = List.filter (printable >> not) [ 0..255 ]

    [|
        for b in 0..255 ->
            let code =
                if printable b then
                    b
                else
                    256 + List.findIndex ((=) b) others

            string (char code)
    |]

let rec private merged (a, b) =
    function
    | x :: y :: rest when (x, y) = (a, b) -> (a + b) :: merged (a, b) rest
    | x :: rest -> x :: merged (a, b) rest
    | [] -> []

/// Byte pairs trained on the text itself, but on pairs drawn at random from all of it: tokens begin and end within characters.
let private trained (c: TextCase) =
    let random = System.Random c.Seed

    let step (tokens: string list, merges) _ =
        match List.pairwise tokens with
        | [] -> tokens, merges
        | pairs ->
            let pair = pairs[random.Next pairs.Length]
            merged pair tokens, pair :: merges

    let bytes = [ for b in Encoding.UTF8.GetBytes c.Text -> alphabet[int b] ]
    let merges = List.fold step (bytes, []) [ 1 .. c.Merges ] |> snd |> List.rev

    let tokens =
        List.distinct ([ bos; eos ] @ List.ofArray alphabet @ [ for a, b in merges -> a + b ])

    let json =
        parse
            """{"added_tokens": [{"id": 0, "content": "<s>", "special": true}, {"id": 1, "content": "</s>", "special": true}],
                "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
                "decoder": {"type": "ByteLevel"}}"""

    let model =
        {|
            ``type`` = "BPE"
            vocab = dict [ for id, token in List.indexed tokens -> token, id ]
            merges = [ for a, b in List.distinct merges -> [ a; b ] ]
        |}

    json["post_processor"] <- parse enclosing
    json["model"] <- JsonSerializer.SerializeToNode model
    load json

/// Half a character shows as the replacement character, which no text here has.
let private whole (s: string) =
    s.EnumerateRunes() |> Seq.forall (fun r -> r <> Rune.ReplacementChar)

let private streamed (tokenizer: HuggingFaceTokenizer) ids skip =
    let decoder = tokenizer.CreateStreamDecoder skip
    let parts = [ for id in ids -> decoder.Append id ]
    let rest = decoder.Flush()

    if not (List.forall whole parts) then
        failwith $"half a character in %A{parts}"

    if rest <> "" then
        failwith $"a rest after the last token: %A{rest}"

    System.String.Concat parts

let private roundTrip encloses (tokenizer: HuggingFaceTokenizer) (text: string) =
    let bare, full = tokenizer.Encode(text, false), tokenizer.Encode(text, true)
    let outer = if encloses then bos + text + eos else text

    let check label ids skip wanted =
        ((tokenizer.Decode(ids, skip) = wanted) |> Prop.label label)
        .&. ((streamed tokenizer ids skip = wanted) |> Prop.label $"{label}, streamed")

    check "text" bare false text
    .&. check "text with special tokens" full false outer
    .&. check "text without special tokens" full true (specials.Replace(text, ""))
    |> Prop.classify (specials.IsMatch text) "with special tokens in the text"

[<Property>]
let ``the sample's tokenizer decodes what it encodes`` (c: TextCase) = roundTrip false ofSample.Value c.Text

[<Property>]
let ``so it does between bos and eos, cut as GPT-2 does`` (c: TextCase) =
    roundTrip true ofSampleEnclosing.Value c.Text

[<Property>]
let ``so does one whose tokens end within characters`` (c: TextCase) = roundTrip true (trained c) c.Text
