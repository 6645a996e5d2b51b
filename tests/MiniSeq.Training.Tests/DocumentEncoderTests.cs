using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.Tests;

public sealed class DocumentEncoderTests
{
    private static readonly string s_tokenizerFolder = Path.GetFullPath(Path.Combine(AppContext.BaseDirectory, "tokenizer"));

    private static readonly HuggingFaceTokenizer s_tokenizer = HuggingFaceTokenizer.FromPretrained(s_tokenizerFolder);

    private static string Text(IEnumerable<long> ids) => s_tokenizer.Decode(ids.Select(i => (int)i), skipSpecialTokens: false);

    [Fact]
    public void LossIsOnTheTargetOrOnEverything()
    {
        var encoder = new DocumentEncoder(s_tokenizer, "Read: {input}\nSummary:\n", 1000);
        var masked = encoder.Encode("The index is a B-tree.", "An index.");
        Assert.Equal("<s>Read: The index is a B-tree.\nSummary:\nAn index.</s>", Text(masked.InputIds));
        Assert.Equal("An index.</s>", Text(masked.Labels.Where(l => l >= 0)));
        var all = encoder.Encode("The index is a B-tree.", "An index.", completionOnlyLoss: false);
        Assert.Equal(all.InputIds, all.Labels);
        Assert.Equal<IEnumerable<long>>(masked.InputIds, [.. encoder.Prompt("The index is a B-tree.", 0).Select(i => (long)i), .. masked.Labels.Where(l => l >= 0)]);
        var text = encoder.Encode("Only a text.", null);
        Assert.Equal("<s>Only a text.</s>", Text(text.InputIds));
        Assert.Equal(text.InputIds, text.Labels);
    }

    [Fact]
    public void TheDocumentIsCutAndNeverTheTarget()
    {
        var encoder = new DocumentEncoder(s_tokenizer, "{input}\nSummary:\n", 40);
        string target = "A file of pages, each of one size.";
        var sequence = encoder.Encode(string.Concat(Enumerable.Repeat("The database file is a sequence of pages. ", 50)), target);
        Assert.Equal(40, sequence.Length);
        Assert.EndsWith("\nSummary:\n" + target + "</s>", Text(sequence.InputIds));
        Assert.Equal(1, encoder.TruncatedCount);
        encoder.Encode("Short.", target);
        Assert.Equal(1, encoder.TruncatedCount);
        Assert.Contains("never cut", Assert.Throws<SequenceTooLongException>(() => encoder.Encode("a", string.Concat(Enumerable.Repeat(target, 10)))).Message);
        Assert.Equal(30, encoder.Prompt(string.Concat(Enumerable.Repeat("page ", 100)), reserve: 10).Length);
    }

    [Fact]
    public void WrongTemplatesAndLengthsAreRefused()
    {
        Assert.Contains("{input} once", Assert.Throws<ArgumentException>(() => new DocumentEncoder(s_tokenizer, "no place", 100)).Message);
        Assert.Contains("{input} once", Assert.Throws<ArgumentException>(() => new DocumentEncoder(s_tokenizer, "{input}{input}", 100)).Message);
        Assert.Contains("no room", Assert.Throws<ArgumentException>(() => new DocumentEncoder(s_tokenizer, "{input} and a long instruction after it", 5)).Message);
    }
}
