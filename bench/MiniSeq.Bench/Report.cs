using System.Globalization;
using System.Text.Json;
using System.Text.Json.Nodes;

namespace MiniSeq.Bench;

/// <summary>Tables, JSON and medians, the same way in every command.</summary>
internal static class Report
{
    private static readonly JsonSerializerOptions s_json = new(JsonSerializerDefaults.Web)
    {
        WriteIndented = true,
        NumberHandling = System.Text.Json.Serialization.JsonNumberHandling.AllowNamedFloatingPointLiterals,
    };

    /// <summary>A Markdown table; a column whose name begins with a space is text, the others are numbers.</summary>
    public static void Table(string[] columns, IEnumerable<string[]> rows)
    {
        Console.WriteLine($"| {string.Join(" | ", columns.Select(c => c.Trim()))} |");
        Console.WriteLine($"| {string.Join(" | ", columns.Select(c => c.StartsWith(' ') ? "---" : "---:"))} |");
        foreach (var row in rows) Console.WriteLine($"| {string.Join(" | ", row)} |");
    }

    /// <summary>A number for a table, or a dash.</summary>
    public static string Cell(double? value, int digits = 0) => value is { } v && double.IsFinite(v) ? v.ToString("N" + digits, CultureInfo.InvariantCulture) : "-";

    /// <summary>The same of a JSON number, in a unit.</summary>
    public static string Cell(JsonNode? value, int digits = 0, double unit = 1) => Cell(value is null ? null : Number(value) / unit, digits);

    /// <summary>Bytes in MB of 2^20.</summary>
    public static string Megabytes(long bytes) => Cell(bytes / (double)(1 << 20), bytes < 10 << 20 ? 1 : 0);

    /// <summary>A JSON number of whatever .NET type.</summary>
    public static double Number(JsonNode node) => node.Deserialize<double>();

    public static JsonNode Json(object value) => JsonSerializer.SerializeToNode(value, s_json)!;

    /// <summary>Writes the file that <c>--json</c> names, if it does.</summary>
    public static void Write(FileInfo? file, JsonNode json)
    {
        if (file is not null) File.WriteAllText(file.FullName, json.ToJsonString(s_json) + Environment.NewLine);
    }

    public static double Median(IEnumerable<double> values)
    {
        double[] sorted = [.. values.Order()];
        return (sorted[(sorted.Length - 1) / 2] + sorted[sorted.Length / 2]) / 2;
    }

    /// <summary>Name of the processor.</summary>
    public static string Device()
    {
        const string Info = "/proc/cpuinfo";
        string? name = File.Exists(Info) ? File.ReadLines(Info).FirstOrDefault(l => l.StartsWith("model name", StringComparison.Ordinal)) : null;
        return name?[(name.IndexOf(':') + 1)..].Trim() ?? System.Runtime.InteropServices.RuntimeInformation.OSDescription;
    }
}
