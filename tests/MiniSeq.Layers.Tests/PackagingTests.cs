using System.Buffers.Binary;
using System.Diagnostics;
using System.Text;
using System.Text.Json;
using TorchSharp;

namespace MiniSeq.Layers.Tests;

/// <summary>buildTransitive/MiniSeq.Layers.targets: here, on its own, and in the project of somebody who installs the packages.</summary>
[Trait("Category", "Packaging")]
public sealed class PackagingTests : IDisposable
{
    private const string Library = "libLibTorchSharp.so";
    private static readonly string s_targets = Path.Combine(RepositoryRoot(), "src", "MiniSeq.Layers", "buildTransitive", "MiniSeq.Layers.targets");
    private readonly string _folder = Directory.CreateTempSubdirectory("miniseq-packaging-").FullName;

    public void Dispose() => Directory.Delete(_folder, recursive: true);

    [Fact]
    public void The_native_library_beside_the_tests_starts_on_an_older_libstdcpp()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "The file is of Linux.");
        Assert.DoesNotContain(StrongNeeds(Path.Combine(AppContext.BaseDirectory, Library)), IsNewGlibcxx);
        using torch.Tensor ones = torch.ones(2), sum = ones.sum();
        Assert.Equal(2f, sum.item<float>());
    }

    [Fact(Timeout = 300_000)]
    public async Task A_second_run_changes_nothing_and_the_package_is_not_touched()
    {
        CancellationToken token = TestContext.Current.CancellationToken;
        Assert.SkipUnless(OperatingSystem.IsLinux(), "The file is of Linux.");
        string original = Path.Combine(await PackageCache(), "torchsharp", typeof(torch).Assembly.GetName().Version!.ToString(3), "runtimes", "linux-x64", "native", Library);
        byte[] before = await File.ReadAllBytesAsync(original, token);

        (string used, _) = await RunTargets(original);
        Assert.NotEqual(original, used);
        byte[] weak = await File.ReadAllBytesAsync(used, token);
        DateTime written = File.GetLastWriteTimeUtc(used);
        Assert.DoesNotContain(StrongNeeds(used), IsNewGlibcxx);
        // One flag of one byte, or of two where both versions are named.
        Assert.InRange(before.Zip(weak).Count(pair => pair.First != pair.Second), StrongNeeds(original).Any(IsNewGlibcxx) ? 1 : 0, 2);
        Assert.Equal(before.Length, weak.Length);

        Assert.Equal(used, (await RunTargets(original)).Used);
        Assert.Equal(written, File.GetLastWriteTimeUtc(used));

        // The task itself over its own result.
        string again = Path.Combine(_folder, Library);
        File.Move(used, again);
        (used, _) = await RunTargets(again);
        Assert.NotEqual(again, used);
        Assert.Equal(weak, await File.ReadAllBytesAsync(used, token));
        Assert.Equal(before, await File.ReadAllBytesAsync(original, token));
    }

    [Fact(Timeout = 300_000)]
    public async Task A_need_that_is_really_used_stays_strong()
    {
        Assert.SkipUnless(OperatingSystem.IsLinux(), "The file is of Linux.");
        CancellationToken token = TestContext.Current.CancellationToken;
        // GLIBCXX_3.4.30 (condition_variable::wait) is used; under another name it looks like one of the two.
        byte[] content = await File.ReadAllBytesAsync(Path.Combine(AppContext.BaseDirectory, Library), token);
        int name = content.AsSpan().IndexOf("GLIBCXX_3.4.30\0"u8);
        Assert.SkipUnless(name > 0, "This version of the library has no such need.");
        content[name + "GLIBCXX_3.4.3".Length] = (byte)'1';
        string file = Path.Combine(_folder, Library);
        await File.WriteAllBytesAsync(file, content, token);

        (string used, string output) = await RunTargets(file);
        Assert.NotEqual(file, used);
        Assert.Contains("GLIBCXX_3.4.31", StrongNeeds(used));
        Assert.Contains("GLIBCXX_3.4.31 is really used", output, StringComparison.Ordinal);
        Assert.Equal(content, await File.ReadAllBytesAsync(used, token));
    }

    [Theory(Timeout = 300_000)]
    [InlineData("text")]
    [InlineData("32-bit")]
    [InlineData("cut off")]
    [InlineData("empty")]
    public async Task A_file_that_cannot_be_read_is_left_alone_with_a_warning(string kind)
    {
        CancellationToken token = TestContext.Current.CancellationToken;
        byte[] elf = new byte[4096];
        "\u007fELF\u0002\u0001\u0001"u8.CopyTo(elf);
        BinaryPrimitives.WriteInt64LittleEndian(elf.AsSpan(0x28), 5000);
        BinaryPrimitives.WriteInt16LittleEndian(elf.AsSpan(0x3A), 64);
        BinaryPrimitives.WriteInt16LittleEndian(elf.AsSpan(0x3C), 3);
        elf[4] = (byte)(kind == "32-bit" ? 1 : 2);
        byte[] content = kind switch { "text" => Encoding.ASCII.GetBytes(new string('x', 100)), "empty" => [], _ => elf };
        string file = Path.Combine(_folder, Library);
        await File.WriteAllBytesAsync(file, content, token);

        (string used, string output) = await RunTargets(file);
        Assert.Equal(file, used);
        Assert.Contains("warning MINISEQ001", output, StringComparison.Ordinal);
        Assert.Equal(content, await File.ReadAllBytesAsync(file, token));
    }

    [Fact(Timeout = 300_000)]
    public async Task MiniSeqWeakenGlibcxx_false_leaves_the_file_alone()
    {
        CancellationToken token = TestContext.Current.CancellationToken;
        string file = Path.Combine(_folder, Library);
        await File.WriteAllTextAsync(file, "anything", token);
        (string used, string output) = await RunTargets(file, "-p:MiniSeqWeakenGlibcxx=false");
        Assert.Equal(file, used);
        Assert.DoesNotContain("MINISEQ001", output, StringComparison.Ordinal);
    }

    /// <summary>
    /// Packs, installs and runs. The sources are copied and packed there: packing in the repository would write into obj while the build or the tests of
    /// another project use it, and --no-build would need all projects built, in the same configuration, by whoever runs this one project's tests.
    /// </summary>
    [Fact(Timeout = 900_000)]
    public async Task A_new_project_installs_the_packages_and_runs()
    {
        CancellationToken token = TestContext.Current.CancellationToken;
        Assert.SkipUnless(OperatingSystem.IsLinux(), "The file is of Linux.");
        string sources = Path.Combine(_folder, "sources"), feed = Path.Combine(_folder, "feed"), app = Path.Combine(_folder, "app");
        string version = $"0.1.0-test.{DateTime.UtcNow.Ticks}", cache = await PackageCache();
        CopySources(sources);
        string[] projects = Directory.GetFiles(Path.Combine(sources, "src"), "*.csproj", SearchOption.AllDirectories);
        await File.WriteAllTextAsync(Path.Combine(sources, "all.slnx"), $"<Solution>{string.Concat(projects.Select(project => $"<Project Path=\"{project}\" />"))}</Solution>", token);
        Directory.CreateDirectory(app);
        await File.WriteAllTextAsync(Path.Combine(app, "nuget.config"), $"""<configuration><packageSources><add key="miniseq" value="{feed}" /></packageSources></configuration>""", token);
        await File.WriteAllTextAsync(Path.Combine(app, "app.csproj"), $"""
            <Project Sdk="Microsoft.NET.Sdk">
              <PropertyGroup>
                <OutputType>Exe</OutputType>
                <TargetFramework>net10.0</TargetFramework>
              </PropertyGroup>
              <ItemGroup>
                <PackageReference Include="MiniSeq.MLNet" Version="{version}" />
                <PackageReference Include="TorchSharp-cpu" Version="{typeof(torch).Assembly.GetName().Version!.ToString(3)}" />
              </ItemGroup>
            </Project>
            """, token);
        await File.WriteAllTextAsync(Path.Combine(app, "Program.cs"), """
            using TorchSharp;
            System.Console.WriteLine($"{typeof(Microsoft.ML.MLContext).Name} {torch.ones(2).sum().item<float>()}");
            """, token);
        try
        {
            // The lock files name the projects' own version, which is another one here.
            await Dotnet(sources, "pack", "all.slnx", "-o", feed, $"-p:Version={version}", "-p:RestoreLockedMode=false");
            Assert.Equal(projects.Length, Directory.GetFiles(feed, "*.nupkg").Length);

            // Hard links save 2 GB of copies, and would be the way to damage the package cache.
            string[] links = ["-p:CreateHardLinksForCopyLocalIfPossible=true", "-p:CreateHardLinksForPublishFilesIfPossible=true"];
            string anyPlatform = Path.Combine(_folder, "any"), thisPlatform = Path.Combine(_folder, "this");
            await Dotnet(app, ["build", "-warnaserror", "-o", anyPlatform, .. links]);
            Assert.DoesNotContain(StrongNeeds(Path.Combine(anyPlatform, "runtimes", "linux-x64", "native", Library)), IsNewGlibcxx);
            Assert.Equal("MLContext 2", (await Dotnet(app, Path.Combine(anyPlatform, "app.dll"))).Trim());

            await Dotnet(app, ["publish", "-warnaserror", "--use-current-runtime", "--no-self-contained", "-o", thisPlatform, .. links]);
            Assert.DoesNotContain(StrongNeeds(Path.Combine(thisPlatform, Library)), IsNewGlibcxx);
            Assert.Equal("MLContext 2", (await Dotnet(app, Path.Combine(thisPlatform, "app.dll"))).Trim());
        }
        finally
        {
            foreach (string project in projects)
            {
                string installed = Path.Combine(cache, Path.GetFileNameWithoutExtension(project).ToLowerInvariant(), version);
                if (Directory.Exists(installed))
                {
                    Directory.Delete(installed, recursive: true);
                }
            }
        }
    }

    private static CancellationToken Token => TestContext.Current.CancellationToken;

    private static bool IsNewGlibcxx(string need) => need is "GLIBCXX_3.4.31" or "GLIBCXX_3.4.32";

    private static string RepositoryRoot()
    {
        string? folder = AppContext.BaseDirectory;
        while (folder is not null && !File.Exists(Path.Combine(folder, "MiniSeqMLNet.sln")))
        {
            folder = Path.GetDirectoryName(folder);
        }
        return folder ?? throw new DirectoryNotFoundException("The tests have to lie in the repository.");
    }

    private static void CopySources(string to)
    {
        string root = RepositoryRoot();
        string[] atTheRoot = ["Directory.Build.props", "Directory.Build.targets", "Directory.Packages.props", "global.json", ".editorconfig", "README.md"];
        IEnumerable<string> files = atTheRoot.Concat(Directory.EnumerateFiles(Path.Combine(root, "src"), "*", SearchOption.AllDirectories).Select(file => Path.GetRelativePath(root, file)));
        foreach (string file in files.Where(file => !file.Split(Path.DirectorySeparatorChar).Any(part => part is "bin" or "obj")))
        {
            string copy = Path.Combine(to, file);
            Directory.CreateDirectory(Path.GetDirectoryName(copy)!);
            File.Copy(Path.Combine(root, file), copy);
        }
    }

    private static async Task<string> PackageCache()
    {
        string line = await Dotnet(RepositoryRoot(), "nuget", "locals", "global-packages", "--list");
        return line[(line.IndexOf(':', StringComparison.Ordinal) + 1)..].Trim();
    }

    /// <summary>Runs the targets over one file in place of the SDK's list, and says which file is in the list afterwards.</summary>
    private async Task<(string Used, string Output)> RunTargets(string file, params string[] options)
    {
        string project = Path.Combine(_folder, "one.proj"), list = Path.Combine(_folder, "list.json");
        await File.WriteAllTextAsync(project, $"""
            <Project>
              <PropertyGroup><IntermediateOutputPath>obj/</IntermediateOutputPath></PropertyGroup>
              <ItemGroup><NativeCopyLocalItems Include="{file}" NuGetPackageVersion="1" PathInPackage="{Library}" /></ItemGroup>
              <Target Name="ResolvePackageAssets" />
              <Import Project="{s_targets}" />
            </Project>
            """, Token);
        string output = await Dotnet(_folder, ["msbuild", project, "-nologo", "-nodeReuse:false", "-t:ResolvePackageAssets", "-getItem:NativeCopyLocalItems", $"-getResultOutputFile:{list}", .. options]);
        using JsonDocument json = JsonDocument.Parse(await File.ReadAllTextAsync(list, Token));
        return (json.RootElement.GetProperty("Items").GetProperty("NativeCopyLocalItems")[0].GetProperty("FullPath").GetString()!, output);
    }

    private static async Task<string> Dotnet(string folder, params string[] arguments)
    {
        var start = new ProcessStartInfo("dotnet", arguments) { WorkingDirectory = folder, RedirectStandardOutput = true, RedirectStandardError = true };
        // Nothing of the dotnet that runs these tests may lead the child; no build server may outlive it and hold its output open.
        foreach (string name in start.Environment.Keys.Where(name => name.StartsWith("MSBUILD", StringComparison.OrdinalIgnoreCase)).ToArray())
        {
            start.Environment.Remove(name);
        }
        start.Environment["MSBUILDDISABLENODEREUSE"] = "1";
        start.Environment["UseSharedCompilation"] = "false";
        start.Environment["DOTNET_CLI_UI_LANGUAGE"] = "en";
        using Process process = Process.Start(start)!;
        try
        {
            Task<string> output = process.StandardOutput.ReadToEndAsync(Token), error = process.StandardError.ReadToEndAsync(Token);
            await process.WaitForExitAsync(Token);
            string text = await output + await error;
            Assert.True(process.ExitCode == 0, $"dotnet {string.Join(' ', arguments)} ended with {process.ExitCode}:\n{text}");
            return text;
        }
        finally
        {
            if (!process.HasExited)
            {
                process.Kill(entireProcessTree: true);
            }
        }
    }

    /// <summary>What the loader reads: the needed versions by way of the dynamic segment (the task goes by the section headers).</summary>
    private static List<string> StrongNeeds(string file)
    {
        byte[] bytes = File.ReadAllBytes(file);
        long Word(long at) => BinaryPrimitives.ReadInt64LittleEndian(bytes.AsSpan((int)at));
        int Half(long at) => BinaryPrimitives.ReadInt32LittleEndian(bytes.AsSpan((int)at));
        int Quarter(long at) => BinaryPrimitives.ReadUInt16LittleEndian(bytes.AsSpan((int)at));

        var segments = Enumerable.Range(0, Quarter(0x38)).Select(i => Word(0x20) + (long)i * Quarter(0x36))
            .Select(at => (Type: Half(at), Offset: Word(at + 8), Address: Word(at + 16), Size: Word(at + 32))).ToList();
        long Offset(long address) => segments.Where(s => s.Type == 1 && address >= s.Address && address < s.Address + s.Size).Select(s => address - s.Address + s.Offset).Single();
        (_, long dynamic, _, long size) = segments.Single(s => s.Type == 2);
        var tags = Enumerable.Range(0, (int)size / 16).Select(i => dynamic + i * 16L).TakeWhile(at => Word(at) != 0).ToLookup(Word, at => Word(at + 8));

        var strong = new List<string>();
        long names = Offset(tags[5].Single()), need = Offset(tags[0x6ffffffe].Single());
        for (long i = tags[0x6fffffff].Single(); i > 0; i--, need += Half(need + 12))
        {
            long entry = need + Half(need + 8);
            for (int j = Quarter(need + 2); j > 0; j--, entry += Half(entry + 12))
            {
                long name = names + Half(entry + 8);
                if ((Quarter(entry + 4) & 2) == 0)
                {
                    strong.Add(Encoding.ASCII.GetString(bytes, (int)name, Array.IndexOf(bytes, (byte)0, (int)name) - (int)name));
                }
            }
        }
        return strong;
    }
}
