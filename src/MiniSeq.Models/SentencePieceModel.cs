using System.Buffers.Binary;
using System.Text;

namespace MiniSeq.Models;

/// <summary>Reads a SentencePiece <c>tokenizer.model</c> of the BPE kind (Llama 2, Mistral, Gemma).</summary>
/// <remarks>Format: sentencepiece_model.proto of https://github.com/google/sentencepiece. Pieces merge where their union is a piece, the highest
/// score first, which as merges means: all ways to cut a piece in two pieces, ranked by the piece's score.</remarks>
internal static class SentencePieceModel
{
    private const string Space = "\u2581";
    private const int BytePairs = 2;

    private enum PieceType
    {
        Normal = 1,
        Unknown = 2,
        Control = 3,
        UserDefined = 4,
        Unused = 5,
        Byte = 6,
    }

    private readonly record struct Piece(string Text, float Score, PieceType Type);

    /// <param name="file">The tokenizer.model.</param>
    /// <param name="addBos">Whether a text begins with the model's bos token.</param>
    /// <param name="addEos">Whether it ends with the eos token.</param>
    public static TokenizerParts Read(string file, bool addBos, bool addEos)
    {
        try
        {
            return Parse(File.ReadAllBytes(file), addBos, addEos);
        }
        catch (NotSupportedException fault)
        {
            throw new NotSupportedException($"{file}: {fault.Message}", fault);
        }
        catch (Exception fault) when (fault is InvalidDataException or ArgumentException or OverflowException)
        {
            throw new InvalidDataException($"{file}: this is no SentencePiece model: {fault.Message}", fault);
        }
    }

    private static TokenizerParts Parse(byte[] file, bool addBos, bool addEos)
    {
        var pieces = new List<Piece>();
        var trainer = new Dictionary<int, Field>();
        var normalizer = new Dictionary<int, Field>();
        foreach (var (number, field) in Fields(file))
            if (number == 1)
                pieces.Add(ParsePiece(field.Bytes));
            else if (number is 2 or 3)
                foreach (var (inner, value) in Fields(field.Bytes))
                    (number == 2 ? trainer : normalizer)[inner] = value;
        if (pieces.Count == 0)
            throw new InvalidDataException("it has no pieces");
        RefuseUnknownKinds(trainer, normalizer);

        var ids = new Dictionary<string, int>();
        for (var id = 0; id < pieces.Count; id++)
            ids.TryAdd(pieces[id].Text, id);
        var prefix = normalizer.GetValueOrDefault(3, new Field(1)).Number != 0;
        return new TokenizerParts
        {
            Ids = ids,
            Model = Encoder(pieces, checked((int)trainer.GetValueOrDefault(40, new Field(0)).Number)),
            Added = [.. pieces.Where(piece => piece.Type == PieceType.UserDefined).Select(piece => new AddedToken(piece.Text, ids[piece.Text], true, false, false, false))],
            Special = [.. pieces.Where(piece => piece.Type is PieceType.Control or PieceType.Unknown).Select(piece => ids[piece.Text])],
            Normalize = text => (prefix && text.Length > 0 ? Space : "") + text.Replace(" ", Space, StringComparison.Ordinal),
            Template = (addBos ? Control(trainer, 41, 1) : [], addEos ? Control(trainer, 42, 2) : []),
            Decoder = new TokenDecoder { ByteFallback = true, Replacements = [(Space, " ")], Strip = prefix ? 1 : 0 },
        };
    }

    private static void RefuseUnknownKinds(Dictionary<int, Field> trainer, Dictionary<int, Field> normalizer)
    {
        if (trainer.GetValueOrDefault(3, new Field(1)).Number is var type && type != BytePairs)
            throw new NotSupportedException($"the SentencePiece model '{type switch { 1 => "Unigram", 3 => "Word", 4 => "Char", _ => $"{type}" }}' is not supported (supported: BPE).");
        if (normalizer.TryGetValue(2, out var map) && map.Bytes.Length > 0)
            throw new NotSupportedException($"the SentencePiece normalization '{Encoding.UTF8.GetString(normalizer.GetValueOrDefault(1).Bytes.Span)}' is not supported (supported: identity).");
        if (normalizer.GetValueOrDefault(4, new Field(1)).Number != 0)
            throw new NotSupportedException("a SentencePiece model that removes extra white space is not supported.");
        if (normalizer.GetValueOrDefault(5, new Field(1)).Number == 0)
            throw new NotSupportedException("a SentencePiece model that does not escape white space is not supported.");
    }

    private static BytePairEncoder Encoder(List<Piece> pieces, int unknown)
    {
        var vocabulary = new Dictionary<string, int>();
        var bytes = Enumerable.Repeat(-1, 256).ToArray();
        for (var id = 0; id < pieces.Count; id++)
            if (pieces[id].Type is PieceType.Normal or PieceType.UserDefined)
                vocabulary.TryAdd(pieces[id].Text, id);
            else if (pieces[id].Type == PieceType.Byte && TokenDecoder.ByteOf(pieces[id].Text) is { } value)
                bytes[value] = id;
        return new BytePairEncoder(vocabulary, Merges(pieces, vocabulary), bytes, unknown, fuseUnknown: true);
    }

    private static List<Merge> Merges(List<Piece> pieces, Dictionary<string, int> vocabulary)
    {
        var merges = new List<Merge>();
        var known = vocabulary.GetAlternateLookup<ReadOnlySpan<char>>();
        // Equal scores share a rank: SentencePiece then takes the leftmost.
        var rank = -1;
        var score = float.NaN;
        foreach (var piece in pieces.Where(piece => piece.Type == PieceType.Normal).OrderByDescending(piece => piece.Score))
        {
            if (piece.Score != score)
                rank++;
            score = piece.Score;
            for (var cut = 1; cut < piece.Text.Length; cut++)
                if (known.ContainsKey(piece.Text.AsSpan(0, cut)) && known.ContainsKey(piece.Text.AsSpan(cut)))
                    merges.Add(new Merge(piece.Text[..cut], piece.Text[cut..], rank));
        }
        return merges;
    }

    private static int[] Control(Dictionary<int, Field> trainer, int field, int otherwise) =>
        (int)(long)trainer.GetValueOrDefault(field, new Field((ulong)otherwise)).Number is >= 0 and var id ? [id] : [];

    private static Piece ParsePiece(ReadOnlyMemory<byte> message)
    {
        var piece = new Piece("", 0, PieceType.Normal);
        foreach (var (number, field) in Fields(message))
            piece = number switch
            {
                1 => piece with { Text = Encoding.UTF8.GetString(field.Bytes.Span) },
                2 => piece with { Score = BitConverter.UInt32BitsToSingle((uint)field.Number) },
                3 => piece with { Type = (PieceType)field.Number },
                _ => piece,
            };
        return piece;
    }

    /// <summary>A protobuf field: a number, or bytes.</summary>
    private readonly record struct Field(ulong Number, ReadOnlyMemory<byte> Bytes = default);

    private static IEnumerable<(int Number, Field Field)> Fields(ReadOnlyMemory<byte> message)
    {
        while (message.Length > 0)
        {
            var tag = Varint(ref message);
            yield return ((int)(tag >> 3), (tag & 7) switch
            {
                0 => new Field(Varint(ref message)),
                1 => new Field(BinaryPrimitives.ReadUInt64LittleEndian(Take(ref message, 8).Span)),
                2 => new Field(0, Take(ref message, Varint(ref message))),
                5 => new Field(BinaryPrimitives.ReadUInt32LittleEndian(Take(ref message, 4).Span)),
                var kind => throw new InvalidDataException($"a field of the unknown kind {kind}"),
            });
        }
    }

    private static ulong Varint(ref ReadOnlyMemory<byte> message)
    {
        var value = 0UL;
        for (var shift = 0; shift < 64; shift += 7)
        {
            var part = Take(ref message, 1).Span[0];
            value |= (ulong)(part & 0x7F) << shift;
            if (part < 0x80)
                return value;
        }
        throw new InvalidDataException("a number of more than 64 bits");
    }

    private static ReadOnlyMemory<byte> Take(ref ReadOnlyMemory<byte> message, ulong count)
    {
        if (count > (ulong)message.Length)
            throw new InvalidDataException("it ends in the middle of a field");
        var taken = message[..(int)count];
        message = message[(int)count..];
        return taken;
    }
}
