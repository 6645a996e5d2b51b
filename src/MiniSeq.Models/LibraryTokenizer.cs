using System.Buffers;
using System.Text;
using Microsoft.ML.Tokenizers;

namespace MiniSeq.Models;

/// <summary>A <see cref="HuggingFaceTokenizer"/> for whatever takes a tokenizer of Microsoft.ML.Tokenizers: text chunkers, token counters.</summary>
/// <remarks>No special tokens are added. The normalized text is the tokens' own spelling (with U+2581 for spaces in SentencePiece models), and
/// offsets count its characters. Normalization and pre-tokenization are part of the model and cannot be switched off.</remarks>
internal sealed class LibraryTokenizer(HuggingFaceTokenizer tokenizer) : Tokenizer
{
    protected override EncodeResults<EncodedToken> EncodeToTokens(string? text, ReadOnlySpan<char> textSpan, EncodeSettings settings)
    {
        var ids = tokenizer.Encode(text ?? textSpan.ToString(), addSpecialTokens: false);
        var tokens = new List<EncodedToken>(Math.Min(ids.Count, settings.MaxTokenCount));
        var spelled = new StringBuilder();
        var utf8 = Encoding.UTF8.GetDecoder();
        foreach (var id in ids)
        {
            var begin = spelled.Length;
            var (token, bytes) = tokenizer.Spelling(id);
            var chars = new char[utf8.GetCharCount(bytes, flush: false)];
            // A token with a part of a character is empty, up to the one that completes it.
            spelled.Append(chars, 0, utf8.GetChars(bytes, chars, flush: false));
            if (tokens.Count < settings.MaxTokenCount)
                tokens.Add(new EncodedToken(id, token, begin..spelled.Length));
        }
        return new EncodeResults<EncodedToken>
        {
            Tokens = tokens,
            NormalizedText = spelled.ToString(),
            CharsConsumed = tokens.Count == 0 ? 0 : tokens[^1].Offset.End.Value,
        };
    }

    public override string Decode(IEnumerable<int> ids) => tokenizer.Decode(ids, skipSpecialTokens: false);

    public override OperationStatus Decode(IEnumerable<int> ids, Span<char> destination, out int idsConsumed, out int charsWritten)
    {
        ArgumentNullException.ThrowIfNull(ids);
        (idsConsumed, charsWritten) = (0, 0);
        var stream = tokenizer.CreateStreamDecoder(skipSpecialTokens: false);
        var seen = 0;
        foreach (var id in ids)
        {
            var text = stream.Append(id);
            if (!text.TryCopyTo(destination[charsWritten..]))
                return OperationStatus.DestinationTooSmall;
            charsWritten += text.Length;
            seen++;
            if (text.Length > 0) // else the id may be part of a character, and is needed again
                idsConsumed = seen;
        }
        var rest = stream.Flush();
        if (!rest.TryCopyTo(destination[charsWritten..]))
            return OperationStatus.DestinationTooSmall;
        charsWritten += rest.Length;
        idsConsumed = seen;
        return OperationStatus.Done;
    }
}
