using System.Text.Json;

namespace LongDocumentSummarization;

/// <summary>A row of the data: a long document and its author's own summary.</summary>
public sealed class Article
{
    public string Title { get; set; } = "";
    public string Document { get; set; } = "";
    public string Summary { get; set; } = "";
}

/// <summary>What the pipeline adds.</summary>
public sealed class SummarizedArticle
{
    public string GeneratedText { get; set; } = "";
}

internal static class Documents
{
    private const int HeldOutEvery = 7, HeldOutAt = 3; // make_tokenizer.py leaves the same ones out

    /// <summary>Reads one JSON object a line, with "document", "summary" and perhaps "title"; every seventh is held out.</summary>
    public static (List<Article> Train, List<Article> HeldOut) Read(string path)
    {
        if (!File.Exists(path)) throw new FileNotFoundException($"There is no data at '{path}'. Give a file of one JSON object a line, with the fields document and summary.", path);
        var (train, heldOut) = (new List<Article>(), new List<Article>());
        int number = 0;
        foreach (var line in File.ReadLines(path).Where(l => !string.IsNullOrWhiteSpace(l)))
        {
            var article = Parse(line, $"'{path}', line {number + 1}");
            (number++ % HeldOutEvery == HeldOutAt ? heldOut : train).Add(article);
        }
        if (train.Count == 0 || heldOut.Count == 0) throw new InvalidDataException($"'{path}' has {number} documents; at least {HeldOutAt + 1} are needed, of which one is held out.");
        return (train, heldOut);
    }

    private static Article Parse(string line, string place)
    {
        try
        {
            using var json = JsonDocument.Parse(line);
            string Text(string name) => json.RootElement.GetProperty(name).GetString() ?? throw new KeyNotFoundException();
            return new Article { Document = Text("document"), Summary = Text("summary"), Title = json.RootElement.TryGetProperty("title", out var title) ? title.GetString() ?? "" : "" };
        }
        catch (Exception e) when (e is JsonException or KeyNotFoundException or InvalidOperationException)
        {
            throw new InvalidDataException($"{place}: not a JSON object with the texts document and summary.", e);
        }
    }
}
