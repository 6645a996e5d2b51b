/// Random files and texts, as records of plain values.
module MiniSeq.Properties.CheckpointGenerators

open System.Text
open FsCheck
open FsCheck.FSharp
open MiniSeq.Properties.Generators

/// The types of the safetensors format that are supported.
type StoredType =
    | F64
    | F32
    | F16
    | BF16
    | I64
    | I32
    | I16
    | I8
    | U8
    | BOOL

type StoredTensor =
    {
        Name: string
        Type: StoredType
        Shape: int list
        /// Its first and last dimension are swapped in memory, so it is not contiguous.
        Transposed: bool
    }

type FileCase =
    {
        Tensors: StoredTensor list
        /// None takes what is written where nothing is said.
        Metadata: (string * string) list option
        ShardBytes: int
        Seed: int
    }

/// A valid text; the seed is that of the merges of a tokenizer made for it.
type TextCase =
    {
        Pieces: string list
        Merges: int
        Seed: int
    }

    member c.Text = System.String.Concat c.Pieces

let private codePoint low high =
    Gen.choose (low, high) |> Gen.map (fun c -> (Rune c).ToString())

let private mark = codePoint 0x300 0x36F

/// Not the replacement character: in what is decoded it means a fault.
let private anywhere =
    Gen.choose (0, 0x10FFFF)
    |> Gen.filter (fun c -> Rune.IsValid c && c <> 0xFFFD)
    |> Gen.map (fun c -> (Rune c).ToString())

let private emoji = Gen.elements [ "😀"; "👍🏽"; "👩‍👩‍👧"; "🇪🇺"; "❤️"; "🏴󠁧󠁢󠁳󠁣󠁴󠁿" ]

let private space =
    Gen.elements
        [
            " "
            "  "
            "     "
            "\t"
            "\n"
            "\r\n"
            "\n\n "
            "\u00A0"
            "\u2028"
            "\u3000"
            "\u200B"
        ]

/// What a tokenizer takes for a special token, and what only looks like one.
let private special =
    Gen.elements [ "<s>"; "</s>"; "<s"; ">"; "s>"; "<<s>s>"; "< s>"; "</s></s>" ]

let private words =
    Gen.elements
        [
            "a"
            "the"
            " select"
            "Wörter"
            "don't"
            "1234567"
            "x_1"
            "…"
            "日本語"
            "हिन्दी"
            "ي"
            "\"%'"
        ]

let private piece =
    Gen.frequency
        [
            4, words
            3, space
            2, emoji
            2, special
            2, mark
            1, codePoint 0 0x1F
            1, codePoint 0x7F 0x9F
            2, codePoint 0x20 0x7E
            2, anywhere
            1, codePoint 0x10000 0x10FFFF
        ]

let private listUpTo longest gen =
    Gen.choose (0, longest) |> Gen.bind (fun n -> Gen.listOfLength n gen)

let private text =
    gen {
        let! pieces = listUpTo 25 piece
        let! merges = Gen.choose (0, 40)
        let! seed = Gen.choose (0, 9999)

        return
            {
                Pieces = pieces
                Merges = merges
                Seed = seed
            }
    }

/// Half of a surrogate pair is no text: no UTF-8 stands for it.
let private isText (s: string) =
    not (isNull s)
    && s.EnumerateRunes() |> Seq.forall (fun r -> r <> Rune.ReplacementChar)

let private validText (c: TextCase) =
    isText c.Text && c.Merges >= 0 && c.Seed >= 0

let private name =
    let plain =
        Gen.elements [ "w"; "model.layers.0.mlp.up_proj.weight"; "__metadata"; "" ]

    Gen.oneof [ plain; listUpTo 6 piece |> Gen.map System.String.Concat ]

let private shape =
    listUpTo 4 (Gen.frequency [ 1, Gen.constant 0; 9, Gen.choose (1, 5) ])

let private storedTensor =
    gen {
        let! name = name
        let! stored = Gen.elements [ F64; F32; F16; BF16; I64; I32; I16; I8; U8; BOOL ]
        let! shape = shape
        let! transposed = Gen.elements [ false; true ]

        return
            {
                Name = name
                Type = stored
                Shape = shape
                Transposed = transposed
            }
    }

let private file =
    gen {
        let! tensors = listUpTo 8 storedTensor
        let! metadata = Gen.optionOf (listUpTo 3 (Gen.zip name name))

        let! shardBytes =
            Gen.frequency [ 4, Gen.choose (1, 600); 1, Gen.choose (600, 100000) ]

        let! seed = Gen.choose (0, 9999)

        return
            {
                Tensors = List.distinctBy _.Name tensors
                Metadata = Option.map (List.distinctBy fst) metadata
                ShardBytes = shardBytes
                Seed = seed
            }
    }

let private distinct names =
    List.forall isText names && List.distinct names = names

let private validFile (c: FileCase) =
    let metadata = Option.defaultValue [] c.Metadata

    distinct (List.map _.Name c.Tensors)
    && distinct (List.map fst metadata)
    && List.forall (snd >> isText) metadata
    && List.forall (fun t -> t.Name <> "__metadata__" && List.forall (fun n -> n >= 0) t.Shape) c.Tensors
    && c.ShardBytes > 0
    && c.Seed >= 0

/// Registered by <c>[<Properties(Arbitrary = ..)>]</c>.
type CheckpointCases =
    static member Text() = text |> shrinking validText

    static member File() = file |> shrinking validFile
