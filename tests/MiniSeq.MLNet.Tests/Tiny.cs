using System.Text.Json;
using Microsoft.ML;
using Microsoft.ML.Data;
using MiniSeq.Models;
using MiniSeq.Training;

namespace MiniSeq.MLNet.Tests;

/// <summary>A model of some thousand weights, its byte-level tokenizer with the tokens of ChatML, and rows for it.</summary>
internal static class Tiny
{
    public const int EndOfTurn = 258;
    private const int Eos = 256;
    private static readonly string s_folder = TokenizerFolder();

    public static HuggingFaceTokenizer Tokenizer { get; } = HuggingFaceTokenizer.FromPretrained(s_folder);

    public static FineTuneOptions Options(string? weights = null) => new()
    {
        Config = DecoderConfig.Llama(vocabSize: 260, hiddenSize: 16, intermediateSize: 24, layers: 1, heads: 2, kvHeads: 1),
        Tokenizer = Tokenizer,
        MaxLength = 64,
        WeightsFolder = weights,
        Training = new TrainingOptions { MaxSteps = 3, LearningRate = 0.02 },
        Generation = new GenerationOptions { MaxNewTokens = 6 },
    };

    public static IDataView Rows(MLContext ml, int count = 10) =>
        ml.Data.LoadFromEnumerable(Enumerable.Range(0, count).Select(i => new Row { Id = i, Document = $"document {i} says {(char)('a' + i)}", Summary = $"{(char)('a' + i)}" }).ToList());

    public static List<string> Texts(MLContext ml, IDataView data) => [.. ml.Data.CreateEnumerable<Result>(data, false).Select(r => r.GeneratedText)];

    // GPT-2's alphabet: printable bytes are themselves, the others come after U+0100 in order.
    private static string TokenizerFolder()
    {
        string folder = Directory.CreateTempSubdirectory("miniseq-tokenizer-").FullName;
        AppDomain.CurrentDomain.ProcessExit += (_, _) => Directory.Delete(folder, true);
        int next = 256;
        var vocab = Enumerable.Range(0, 256).ToDictionary(b => ((char)(b is >= 33 and <= 126 or >= 161 and <= 172 or >= 174 ? b : next++)).ToString(), b => b);
        File.WriteAllText(Path.Combine(folder, "tokenizer.json"), JsonSerializer.Serialize(new
        {
            added_tokens = new[] { (Eos, "<eos>"), (257, "<|im_start|>"), (EndOfTurn, "<|im_end|>") }.Select(token => new { id = token.Item1, content = token.Item2, special = true }),
            pre_tokenizer = new { type = "ByteLevel", add_prefix_space = false, use_regex = true },
            decoder = new { type = "ByteLevel" },
            model = new { type = "BPE", vocab, merges = Array.Empty<string>() },
        }));
        File.WriteAllText(Path.Combine(folder, "tokenizer_config.json"), """{"eos_token":"<eos>"}""");
        return folder;
    }
}

internal sealed class Row
{
    public float Id { get; set; }

    public string Document { get; set; } = "";

    public string Summary { get; set; } = "";
}

internal sealed class Result
{
    [ColumnName("GeneratedText")]
    public string GeneratedText { get; set; } = "";
}

/// <summary>A folder of its own for a test, removed with everything in it.</summary>
internal sealed class TemporaryFolder : IDisposable
{
    public string Path { get; } = Directory.CreateTempSubdirectory("miniseq-").FullName;

    public string this[string name] => System.IO.Path.Combine(Path, name);

    public void Dispose() => Directory.Delete(Path, recursive: true);
}
