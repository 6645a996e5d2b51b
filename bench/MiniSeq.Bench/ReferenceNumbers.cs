using System.Text.Json;
using MiniSeq.Models;
using static TorchSharp.torch;

namespace MiniSeq.Bench;

/// <summary>How far a file's numbers are from those of the same code in float64.</summary>
/// <param name="LossAbsolute">Of the loss.</param>
/// <param name="LogitsAbsolute">The largest of the logits.</param>
/// <param name="GradientL2">‖difference‖ / ‖gradient‖ of the worst gradient.</param>
internal sealed record ReferenceNoise(double LossAbsolute, double LogitsAbsolute, double GradientL2);

/// <summary>The numbers another implementation computed from a checkpoint.</summary>
internal sealed class ReferenceNumbers : IDisposable
{
    private const string Gradient = "grad.";

    /// <summary>Token ids, [batch, S].</summary>
    public required Tensor InputIds { get; init; }

    /// <summary>Labels, [batch, S], not shifted.</summary>
    public required Tensor Labels { get; init; }

    /// <summary>[batch, S, V], or [batch, positions, V] where only some <see cref="Positions"/> are there.</summary>
    public required Tensor Logits { get; init; }

    /// <summary>The places of <see cref="Logits"/> in the sequence; null is all of them.</summary>
    public long[]? Positions { get; init; }

    /// <summary>Mean over all labels that count.</summary>
    public required double Loss { get; init; }

    /// <summary>By the names of the checkpoint, or of the adapter's file; null where the folder has none.</summary>
    public IReadOnlyDictionary<string, Tensor>? Gradients { get; init; }

    /// <summary>What is continued.</summary>
    public required int[] Prompt { get; init; }

    /// <summary>The greedy continuation, end-of-sequence tokens ignored.</summary>
    public required int[] NewTokens { get; init; }

    /// <summary>The continuation by weights that the adapter is merged into; null where the folder does not say.</summary>
    public int[]? MergedNewTokens { get; init; }

    /// <summary>By how much the logits prefer each new token to the next best; null where the folder does not say.</summary>
    public double[]? Margins { get; init; }

    /// <summary>Rounding in the numbers themselves; null where the folder does not say.</summary>
    public ReferenceNoise? Noise { get; init; }

    /// <summary>The batch as documents.</summary>
    public TokenBatch Batch() => new([.. Enumerable.Range(0, (int)InputIds.size(0)).Select(b => new TokenSequence(Row(InputIds, b), Row(Labels, b)))]);

    /// <summary>Reads a folder's numbers.</summary>
    /// <exception cref="FileNotFoundException">It has none.</exception>
    /// <exception cref="InvalidDataException">They are damaged.</exception>
    public static ReferenceNumbers Read(string folder) =>
        File.Exists(Path.Combine(folder, "expected.safetensors")) ? ReadExpected(folder, "expected", folder)
        : File.Exists(Path.Combine(folder, "reference.json")) ? ReadText(Path.Combine(folder, "reference.json"))
        : throw new FileNotFoundException($"'{folder}' has no expected.safetensors: it holds no numbers to check against.");

    /// <summary>Reads the numbers of an adapter, for the ids and labels of the folder above.</summary>
    /// <exception cref="IOException">There are none.</exception>
    /// <exception cref="InvalidDataException">They are damaged.</exception>
    public static ReferenceNumbers ReadAdapter(string folder) => ReadExpected(folder, "expected_adapter", Path.GetDirectoryName(folder)!);

    /// <summary>The type of the computation that gave a checkpoint's numbers: bfloat16 where expected.json's <c>computed_in</c> begins so, else float32.</summary>
    public static ScalarType ComputedIn(string folder)
    {
        string file = Path.Combine(folder, "expected.json");
        return File.Exists(file) && FromJson(file, json => json.TryGetProperty("computed_in", out var type) && type.GetString() is { } said && said.StartsWith("bfloat16", StringComparison.Ordinal))
            ? ScalarType.BFloat16 : ScalarType.Float32;
    }

    // name.safetensors and name.json; ids and labels from the expected.safetensors of a folder.
    private static ReferenceNumbers ReadExpected(string folder, string name, string checkpoint)
    {
        string path = Path.Combine(folder, name + ".safetensors");
        using var file = SafetensorsReader.Open(path);
        using var inputs = SafetensorsReader.Open(Path.Combine(checkpoint, "expected.safetensors"));
        using var loss = file.Read("loss");
        using var ids = inputs.Read("input_ids");
        using var labels = inputs.Read("labels");
        if (ids.dim() != 2 || !labels.shape.AsSpan().SequenceEqual(ids.shape) || loss.numel() != 1)
            throw new InvalidDataException($"'{path}' wants one loss, for input_ids and labels of one shape [batch, S] in expected.safetensors.");
        return FromJson(Path.Combine(folder, name + ".json"), json =>
        {
            var greedy = Property(json, "greedy");
            return new ReferenceNumbers
            {
                InputIds = ids.to(ScalarType.Int64).DetachFromDisposeScope(),
                Labels = labels.to(ScalarType.Int64).DetachFromDisposeScope(),
                Logits = file.Read("logits"),
                Loss = loss.to(ScalarType.Float64).item<double>(),
                Gradients = file.Names.Where(n => n.StartsWith(Gradient, StringComparison.Ordinal)).ToDictionary(n => n[Gradient.Length..], file.Read),
                Prompt = Numbers<int>(greedy, "prompt"),
                NewTokens = Numbers<int>(greedy, "new_tokens"),
                MergedNewTokens = greedy.TryGetProperty("merged_weights_new_tokens", out _) ? Numbers<int>(greedy, "merged_weights_new_tokens") : null,
                Margins = greedy.TryGetProperty("top1_minus_top2", out _) ? Numbers<double>(greedy, "top1_minus_top2") : null,
                Noise = json.TryGetProperty("float32_noise_vs_float64", out var noise)
                    ? new(Property(noise, "loss_abs").GetDouble(), Property(noise, "logits_max_abs").GetDouble(), Property(noise, "grad_max_rel_l2").GetDouble())
                    : null,
            };
        });
    }

    // reference.json: one text that is its model's own greedy continuation of its first token, and two rows of logits.
    private static ReferenceNumbers ReadText(string file) => FromJson(file, json =>
    {
        int[] ids = Numbers<int>(json, "ids");
        using var rows = tensor((double[])[.. Numbers<double>(json, "logits_pos0"), .. Numbers<double>(json, "logits_pos100")]);
        using var row = tensor((long[])[.. ids.Select(i => (long)i)]);
        return new ReferenceNumbers
        {
            InputIds = row.unsqueeze(0).DetachFromDisposeScope(),
            Labels = row.unsqueeze(0).DetachFromDisposeScope(),
            Logits = rows.view(1, 2, -1).DetachFromDisposeScope(),
            Positions = [0, 100],
            Loss = Property(json, "mean_nll").GetDouble(),
            Prompt = ids[..1],
            NewTokens = ids[1..],
        };
    });

    private static T FromJson<T>(string file, Func<JsonElement, T> read)
    {
        try
        {
            using var json = JsonDocument.Parse(File.ReadAllBytes(file));
            return read(json.RootElement);
        }
        catch (Exception e) when (e is JsonException or InvalidOperationException or FormatException)
        {
            throw new InvalidDataException($"'{file}' is not of the format of a reference: {e.Message}", e);
        }
    }

    private static T[] Numbers<T>(JsonElement json, string name) => Property(json, name).Deserialize<T[]>() ?? throw new FormatException($"'{name}' is null");

    private static JsonElement Property(JsonElement json, string name) => json.TryGetProperty(name, out var value) ? value : throw new FormatException($"it lacks '{name}'");

    private static long[] Row(Tensor t, int row)
    {
        using var one = t[row].contiguous();
        return one.data<long>().ToArray();
    }

    public void Dispose()
    {
        foreach (var t in (Tensor[])[InputIds, Labels, Logits, .. Gradients?.Values ?? []]) t.Dispose();
    }
}
